"""The command line: every command, and what it says when something is wrong."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firmly import cli
from firmly.errors import DataError, FirmlyError, SettingsError, StorageError, VerificationError
from firmly.lab import commands

TINY = ["preset=smoke", "steps=2", "epochs=1", "images=1", "twin=false", "certify_seconds=1", "threads=1"]


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "runs" / "tiny"
    result = call("run", "deblur", *TINY, "--folder", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_run_prints_what_it_wrote(tiny_run):
    folder, output = tiny_run
    for name in ("settings.toml", "metrics.jsonl", "weights", "certificate.safetensors", "results.json", "report.html"):
        assert f"wrote {folder / name}" in output and (folder / name).exists()
    assert "certified: no error grows more than" in output and "Best TV" in output


def test_verify_and_report_and_certify_and_attack_on_a_run(tiny_run, tmp_path, monkeypatch):
    folder, _ = tiny_run
    monkeypatch.chdir(tmp_path)
    assert "the certificate holds" in call("verify", folder / "certificate.safetensors", folder).output
    assert f"wrote {folder / 'report.html'}" in call("report", folder).output
    target = tmp_path / "again.safetensors"
    weights = folder / "weights" / "certified.safetensors"
    output = call("certify", weights, "-o", target, "--method", "averaged").output
    assert "<= L <=" in output and f"wrote {target}" in output
    call("verify", target, folder)
    assert "an amplification of" in call("attack", folder, "--radius", "0.1").output


def test_runs_lists_and_compares(tiny_run, tmp_path):
    folder, _ = tiny_run
    listed = call("runs", "--runs", folder.parent).output
    assert "tiny" in listed and "smoke" in listed
    assert "there are no runs" in call("runs", "--runs", tmp_path).output
    other = tmp_path / "other"
    call("run", "deblur", *TINY, "seed=1", "--folder", other)
    compared = call("runs", folder, other).output
    assert "seed" in compared and "Best TV, dB" in compared and "blur_width" not in compared


def test_a_sweep_runs_every_combination(tmp_path):
    output = call("sweep", "deblur", *TINY, "seed=0/1", "--runs", tmp_path).output
    assert "2 of 2" in output and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(SettingsError, match="no setting 'sed'"):
        call("sweep", "deblur", *TINY, "seed=0/1", "sed=3", "--runs", tmp_path)


def test_a_module_factory_is_certified_and_verified(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    output = call("certify", "my_networks:make", "--shape", "3").output
    assert "<= L <=" in output and "wrote my_networks.make.certificate.safetensors" in output
    assert "holds" in call("verify", "my_networks.make.certificate.safetensors", "my_networks:make").output
    assert "an amplification of" in call("attack", "my_networks:make", "--shape", "3").output
    with pytest.raises(SettingsError, match="gave int, expected"):
        call("certify", "my_networks:nothing", "--shape", "3")
    with pytest.raises(SettingsError, match="cannot import my_networks:absent"):
        call("certify", "my_networks:absent", "--shape", "3")
    with pytest.raises(FirmlyError, match="does not know the shape"):
        call("certify", "my_networks:make")
    with pytest.raises(DataError, match="a shape is whole numbers"):
        call("certify", "my_networks:make", "--shape", "three")
    with pytest.raises(SettingsError, match="the radius is positive"):
        call("attack", "my_networks:make", "--shape", "3", "--radius", "-1")
    with pytest.raises(SettingsError, match="cannot certify with respect to"):
        call("certify", "my_networks:make", "--shape", "3", "--wrt", "prior")


def test_a_certificate_for_other_weights_is_refused(tiny_run, tmp_path):
    folder, _ = tiny_run
    other = tmp_path / "other"
    call("run", "deblur", *TINY, "learning_rate=0.1", "--folder", other)
    with pytest.raises(VerificationError, match="other weights"):
        call("verify", folder / "certificate.safetensors", other)
    with pytest.raises(StorageError, match="there is no certificate"):
        call("verify", tmp_path / "absent", other)
    (tmp_path / "broken").write_bytes(b"not a certificate")
    with pytest.raises(VerificationError, match="not a firmly certificate"):
        call("verify", tmp_path / "broken", other)


def test_damaged_weights_are_refused(tiny_run, tmp_path):
    import shutil

    folder, _ = tiny_run
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "weights" / "certified.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        call("certify", copy)
    weights.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="no readable description"):
        call("certify", copy)
    with pytest.raises(StorageError, match="there is no model"):
        call("certify", "absent")
    with pytest.raises(StorageError, match="not a complete run folder"):
        call("report", tmp_path)


def test_a_folder_with_other_settings_is_not_overwritten(tiny_run):
    folder, _ = tiny_run
    with pytest.raises(SettingsError, match="holds a run with other settings"):
        call("run", "deblur", *TINY, "seed=5", "--folder", folder)


def test_control_c_stops_a_run_cleanly(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_experiment", interrupted)
    result = CliRunner().invoke(cli.app, ["run", "deblur", "preset=smoke", "--folder", str(tmp_path / "run")])
    assert result.exit_code == 130 and "every whole epoch is kept" in result.output


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        call("run", "deblur", *TINY, "--folder", tmp_path / "run")


def test_refusals_are_one_sentence_with_exit_code_2(tmp_path):
    for arguments, sentence in (
        (["run", "deblurr"], "there is no experiment 'deblurr'; did you mean deblur?"),
        (["run", "deblur", "dept=3"], "there is no setting 'dept'; did you mean depth"),
        (["run", "deblur", "preset=quick"], "there is no preset 'quick'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "firmly.cli", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_and_doctor_and_bench(tmp_path, monkeypatch):
    listed = call("list").output
    assert all(word in listed for word in ("deblur", "denoise", "inpaint", "mri", "Hqs", "L1", "Blur", "camera"))
    monkeypatch.chdir(tmp_path)
    doctor = call("doctor")
    assert doctor.exit_code == 0 and "everything is in order" in doctor.output and list(tmp_path.iterdir()) == []
    with pytest.raises(SettingsError, match="in a checkout"):
        call("bench")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys; sys.exit(len(sys.argv))")
    assert call("bench").exit_code == 1 and call("bench", "claim", "quick=true").exit_code == 3


def test_help_does_not_load_the_library(tmp_path):
    code = "import sys, firmly.cli; sys.exit('scipy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_main_turns_refusals_into_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["firmly", "report", "/nowhere/at/all"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "firmly: /nowhere/at/all is not a complete run folder" in capsys.readouterr().err
