"""Where training runs: one process on CPU or CUDA, or several under `torchrun` through lightning-fabric."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firmly.errors import SettingsError

Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Engine:
    """One process, one device. Mixed precision only on demand: "bfloat16" runs the forward pass under autocast."""

    rank, world = 0, 1

    def __init__(self, device: Device = "auto", precision: Precision = "float32"):
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto")
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.precision = precision

    @property
    def primary(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def setup(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
        return network

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, value: float) -> float:
        return value

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked."""
        return tensor[None]

    def barrier(self) -> None:
        pass


class DataParallel(Engine):
    """One process per device; every process draws its own batches and the gradients are averaged."""

    def __init__(self, device: Device = "auto", precision: Precision = "float32"):
        super().__init__(device, precision)
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise SettingsError("several processes need lightning-fabric: pip install 'firmly[train]'") from error
        self.fabric = Fabric(
            accelerator=self.device.type,
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            strategy="ddp",
        )
        self.fabric.launch()
        # a process that exits with threads of the group still running is aborted now and then
        atexit.register(torch.distributed.destroy_process_group)
        self.device = self.fabric.device
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size

    def setup(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
        # the optimiser stays outside: it updates the same parameters, and its state is saved as in one process
        return self.fabric.setup_module(network)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def mean(self, value: float) -> float:
        return float(self.fabric.all_reduce(torch.tensor(value, device=self.device), reduce_op="mean"))

    def gather(self, tensor: Tensor) -> Tensor:
        return self.fabric.all_gather(tensor.to(self.device)).reshape(self.world, -1).cpu()

    def barrier(self) -> None:
        self.fabric.barrier()


def start_engine(device: Device = "auto", precision: Precision = "float32") -> Engine:
    """`DataParallel` under torchrun with more than one process, else a plain `Engine`."""
    kind = DataParallel if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Engine
    return kind(device, precision)
