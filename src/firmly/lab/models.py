"""Find a network from what a user names: a run, a file (weights, ONNX, torch.export), or `module:factory`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from firmly.errors import DataError, SettingsError, StorageError
from firmly.lab.experiments import find
from firmly.lab.exported import load_exported
from firmly.lab.onnx_network import load_onnx
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import from_toml
from firmly.lab.study import Study
from firmly.lab.weights import load_weights, unpack


class FromRun(NamedTuple):
    """The experiment and the settings of a run."""

    experiment: Experiment
    settings: ReconstructionSettings


def read_run(run: RunFolder) -> FromRun:
    """What a run folder says that it is."""
    experiment = find(run.environment()["experiment"])
    if isinstance(experiment, Study):
        raise SettingsError(f"{run.path} is a study: its networks are in its report; use its modules from Python")
    return FromRun(experiment, from_toml(type(experiment.presets["default"]), run.settings_text()))


def load_model(name: str, build: str | None = None) -> tuple[nn.Module, FromRun | None]:
    """The network called `name`, and the run that it comes from if there is one.

    `build` is the `module:factory` of the network that a file of plain weights belongs to. No pickle is loaded.
    """
    path = Path(name)
    if build is not None:
        if path.suffix != ".safetensors":
            raise SettingsError(f"--model says what a .safetensors file belongs to; given {name!r}")
        return with_weights(from_factory(build), path), None
    if path.is_dir():
        return load_weights_file(path / f"weights/{RunFolder(path).read_json('results.json')['main']}.safetensors")
    if path.suffix == ".safetensors":
        return load_weights_file(path)
    if path.suffix == ".onnx":
        return load_onnx(path), None
    if path.suffix == ".pt2":
        return load_exported(path), None
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise DataError(
            f"{path} is a pickle, and loading one runs whatever code it holds. Save the weights with "
            "safetensors.torch.save_file(net.state_dict(), 'net.safetensors') and give --model module:factory, or the "
            "network with torch.export.save (.pt2) or torch.onnx.export (.onnx)"
        )
    if ":" in name:
        return from_factory(name), None
    raise StorageError(
        f"there is no model {name!r}: give a run folder, a file (.onnx, .pt2, RUN/weights/NAME.safetensors, or any "
        ".safetensors with --model module:factory), or module:factory"
    )


def with_weights(network: nn.Module, path: Path) -> nn.Module:
    """The network with the parameters and buffers of a safetensors file, which must have exactly its names."""
    tensors, _ = unpack(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{path} does not belong to this network: {error}") from error
    return network


def load_weights_file(path: Path) -> tuple[nn.Module, FromRun]:
    """The network of a file of weights that lies in its run folder."""
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        constrained, size = description["constrained"], description["size"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no readable description {path.with_suffix('.json').name} beside it") from error
    origin = read_run(RunFolder(path.parent.parent))
    network = origin.experiment.network(origin.settings, size, origin.settings.cap if constrained else None)
    load_weights(path, network)
    return network.eval(), origin


def from_factory(name: str) -> nn.Module:
    """The module that `module:factory` returns when called without arguments; the working folder is searched too."""
    module_name, _, factory = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), factory)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"cannot import {name}: {error}") from error
    finally:
        sys.path.pop(0)
    network = made if isinstance(made, nn.Module) else made()
    if not isinstance(network, nn.Module):
        raise SettingsError(f"{name} gave {type(network).__name__}, expected a torch.nn.Module")
    return network.eval()
