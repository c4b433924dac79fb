"""Run folders and weight files, and what happens when the disk or a file is bad."""

import errno
import json
import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from firmly.errors import DataError, SettingsError, StorageError
from firmly.lab.run_folder import RunFolder, find_runs, new_folder
from firmly.lab.weights import load_weights, save_weights


@dataclass(frozen=True)
class Example:
    depth: int = 6


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_begins_once_and_is_found_again(tmp_path):
    first, second = new_folder(tmp_path, "deblur"), new_folder(tmp_path, "deblur")
    assert first.path != second.path
    first.begin("deblur", "smoke", Example())
    first.begin("deblur", "smoke", Example())
    with pytest.raises(SettingsError, match="other settings"):
        first.begin("deblur", "smoke", Example(7))
    with pytest.raises(SettingsError, match="other settings"):
        first.begin("denoise", "smoke", Example())
    assert [run.path for run in find_runs(tmp_path)] == [first.path]
    assert {"torch", "command", "git", "packages"} <= first.environment().keys()


def test_metrics_survive_a_line_cut_short(tmp_path):
    run = RunFolder(tmp_path)
    run.log("epoch", network="a", loss=torch.tensor(0.5))
    run.log("epoch", network="b", loss=0.25)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epo')
    assert [row["loss"] for row in run.metrics("epoch")] == [0.5, 0.25]
    assert [row["loss"] for row in run.metrics("epoch", network="b")] == [0.25]


def test_a_full_disk_is_one_clear_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write_json("results.json", {"psnr": 30})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="the disk is full"):
        run.write_json("results.json", {"psnr": 31})
    assert json.loads((run / "results.json").read_text()) == {"psnr": 30}


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(StorageError, match="not a run folder"):
        RunFolder(tmp_path).settings_text()
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(StorageError, match="is damaged"):
        RunFolder(tmp_path).environment()


def test_weights_round_trip(tmp_path):
    torch.manual_seed(0)
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    save_weights(tmp_path / "w.safetensors", saved, {"experiment": "deblur"})
    load_weights(tmp_path / "w.safetensors", loaded)
    assert torch.equal(saved.weight, loaded.weight) and torch.equal(saved.bias, loaded.bias)
    assert json.loads((tmp_path / "w.json").read_text()) == {"experiment": "deblur"}


def test_foreign_and_damaged_weights_are_refused_and_change_nothing(tmp_path):
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    path = tmp_path / "w.safetensors"
    with pytest.raises(StorageError, match="there is no file"):
        load_weights(path, network)
    save_weights(path, nn.Linear(4, 2), {})
    with pytest.raises(DataError, match="belongs to another network: weight is"):
        load_weights(path, network)
    save_weights(path, nn.Sequential(nn.Linear(3, 2)), {})
    with pytest.raises(DataError, match="belongs to another network: it lacks"):
        load_weights(path, network)
    bad = nn.Linear(3, 2)
    nn.init.constant_(bad.bias, torch.nan)
    save_weights(path, bad, {})
    with pytest.raises(DataError, match="not finite in bias"):
        load_weights(path, network)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="damaged"):
        load_weights(path, network)
    torch.save(nn.Linear(3, 2).state_dict(), path)  # a pickle
    with pytest.raises(DataError, match="damaged or is not a safetensors file"):
        load_weights(path, network)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="not written by firmly"):
        load_weights(path, network)
    assert torch.equal(network.weight, before)
