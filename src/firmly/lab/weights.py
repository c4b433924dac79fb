"""Learned weights on disk: safetensors with a description, never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firmly.errors import DataError, StorageError
from firmly.storage import write_atomically


def learned(network: nn.Module) -> dict[str, Tensor]:
    """The learned tensors of a network by name: its parameters, each once, without what its settings determine."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def save_weights(path: Path, network: nn.Module, description: dict[str, Any]) -> None:
    """Write `path` (safetensors) and beside it the description with the same stem (JSON)."""
    write_atomically(path, pack(learned(network), {"kind": "weights"}))
    write_atomically(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")


def load_weights(path: Path, network: nn.Module) -> None:
    """Copy the weights of a file into a network; a damaged or foreign file is refused before anything changes."""
    tensors, header = unpack(path)
    if header.get("kind") != "weights":
        raise DataError(f"{path} was not written by firmly as a file of weights")
    restore(network, tensors, str(path))


@torch.no_grad()
def restore(network: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Copy named tensors into the network's parameters if names, shapes and types fit and all values are finite."""
    parameters = dict(network.named_parameters())
    missing, foreign = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
    if missing or foreign:
        raise DataError(
            f"{origin} belongs to another network: it lacks {sorted(missing)[:3] or 'nothing'} "
            f"and has {sorted(foreign)[:3] or 'nothing'} in excess"
        )
    for name, parameter in parameters.items():
        given = tensors[name]
        if given.shape != parameter.shape or given.dtype != parameter.dtype:
            raise DataError(
                f"{origin} belongs to another network: {name} is {tuple(given.shape)} {given.dtype}, "
                f"expected {tuple(parameter.shape)} {parameter.dtype}"
            )
        if not given.isfinite().all():
            raise DataError(f"{origin} holds values that are not finite in {name}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def pack(tensors: dict[str, Tensor], header: dict[str, Any]) -> bytes:
    """Tensors and a JSON header as the bytes of one safetensors file."""
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"firmly": json.dumps(header)})


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file made by `pack`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("firmly", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except FileNotFoundError as error:
        raise StorageError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or is not a safetensors file: {error}") from error
