"""Recursive least squares layer by layer, as an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim.gain_profiles import Decreasing, Forgetting, VariableForgetting


class LayerRls(Optimizer):
    """W <- W - lr G R^-1 in every linear and convolutional layer, R <- keep R + (1 - keep) damping + A' A / batch.

    A are the rows that the layer multiplies (inputs, or patches, with a one for the bias) and G the gradient of the
    mean loss over the batch, which is the first dimension of the inputs. Each layer solves the least-squares problem
    of its rows for the errors that come back to it; `profile` says what it forgets. R >= damping always, so that the
    gain R^-1 <= 1 / damping does not wind up without excitation. One layer, a squared loss, no forgetting and lr = 1:
    recursive least squares over batches, exactly.

    Other parameters take gradient steps with `other_lr`. R is factorised every `every` steps; a layer with n inputs
    costs n^3 / 3 then, 2 n^2 per output in every step, and 2 n^2 numbers. Rows are seen by forward hooks, in training
    mode with gradients enabled; `remove()` takes them off. Raises `SettingsError`, `ConditionError` for grouped
    convolutions, complex weights, layers whose weights are shared or not their own, and gradients of layers that saw no
    rows, and `DataError` for rows that are not finite. Source: C. Zhang, Q. Song, H. Zhou, Y. Ou, H. Deng, L. T. Yang,
    arXiv 2109.03220 (recursive least squares per layer); damping derived in the docs.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        profile: Decreasing | Forgetting | VariableForgetting | None = None,
        damping: float = 1e-2,
        every: int = 1,
        other_lr: float = 1e-2,
    ):
        for name, value in (("lr", lr), ("damping", damping), ("other_lr", other_lr)):
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} is positive and finite, given {value!r}")
        if every < 1:
            raise SettingsError(f"every is at least 1, given {every!r}")
        self.profile = Forgetting(0.95) if profile is None else profile
        if not isinstance(self.profile, Decreasing | Forgetting | VariableForgetting):
            raise SettingsError(f"the profile is Decreasing, Forgetting or VariableForgetting, given {profile!r}")
        self.damping, self.every = damping, every
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d) and (
                layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
            ):
                raise ConditionError(f"convolutions have one group and zero padding by numbers here, given {layer}")
        if any(p.is_complex() for layer in self.layers for p in layer.parameters()):
            raise ConditionError("the least-squares problems of layers are real ones: complex weights are not taken")
        owners = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
        if any(owners.count(id(layer.weight)) != 1 for layer in self.layers):
            raise ConditionError("every layer needs a weight of its own: neither shared nor computed from others")
        owned = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in owned)]
        groups = [{"params": owned, "lr": lr}] if owned else []
        super().__init__(groups + ([{"params": rest, "lr": other_lr}] if rest else []), {"lr": lr})
        self.steps = 0
        self._information: dict[nn.Module, Tensor] = {}  # R
        self._factors: dict[nn.Module, Tensor] = {}  # of R by Cholesky, of the last renewal
        self._seen: dict[nn.Module, Tensor] = {}  # A' A / batch since the last step
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in self.layers]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        x = inputs[0].detach().to(layer.weight.dtype)
        if x.ndim == (3 if isinstance(layer, nn.Conv2d) else 1):
            x = x[None]
        batch = len(x)
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        rows = x.flatten(0, -2)
        if layer.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        seen = rows.mT @ rows / batch
        self._seen[layer] = self._seen[layer] + seen if layer in self._seen else seen

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's own leaves out every attribute of a subclass: copies of it could not step
        names = ("profile", "damping", "every", "layers", "steps", "_information", "_factors", "_seen", "_hooks")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients in p.grad; returns what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer in self.layers:
            if (
                layer not in self._seen
                and layer not in self._factors
                and any(p.grad is not None for p in layer.parameters())
            ):
                raise ConditionError(
                    f"{layer} has a gradient, but none of its rows were seen: train in training mode, without layers "
                    "whose forward is not called, such as the output projection of nn.MultiheadAttention"
                )
        keep = self.profile.weights(self.steps).keep
        assert keep is not None  # of these profiles
        owned = {id(p) for layer in self.layers for p in layer.parameters()}
        for layer, seen in self._seen.items():
            old = self._information.get(layer)
            if old is None:
                old = self.damping * torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
            new = keep * old + seen
            new.diagonal().add_((1 - keep) * self.damping)
            self._information[layer] = new
            if self.steps % self.every == 0 or layer not in self._factors:
                factor, failed = torch.linalg.cholesky_ex(new)
                if failed:
                    raise DataError(f"the rows of {layer} are not finite, or too large for damping {self.damping}")
                self._factors[layer] = factor
        self._seen, self.steps = {}, self.steps + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in owned:
                    p.sub_(p.grad, alpha=group["lr"])
        for layer in self.layers:
            self._step_layer(layer)
        return loss

    def _step_layer(self, layer: nn.Linear | nn.Conv2d) -> None:
        parts = [p for p in (layer.weight, layer.bias) if p is not None]
        if all(p.grad is None for p in parts):
            return
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(len(p), -1) for p in parts], 1
        )
        direction = torch.cholesky_solve(gradient.mT, self._factors[layer]).mT
        n = layer.weight[0].numel()
        for p, part in zip(parts, (direction[:, :n], direction[:, n:]), strict=False):
            if p.grad is not None:
                p.sub_(part.reshape(p.shape), alpha=self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """As that of every optimiser, with the matrices of the layers in their order in the model."""
        layers = [(self._information.get(layer), self._factors.get(layer)) for layer in self.layers]
        return {**super().state_dict(), "steps": self.steps, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.steps = state_dict["steps"]
        self._information, self._factors, self._seen = {}, {}, {}
        for layer, (information, factor) in zip(self.layers, state_dict["layers"], strict=True):
            if information is not None:
                self._information[layer] = information.to(layer.weight.device).clone()
                self._factors[layer] = factor.to(layer.weight.device).clone()
