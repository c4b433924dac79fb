"""Symbolic inputs: run a module on a `Signal` and get its `System`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates.system import Coefficient, Input, Linear, Nonlinear, Sum, System
from firmly.errors import NotCertifiable, ShapeError
from firmly.linear.map import LinearMap
from firmly.prox.prior import Slope, Structure

Handler = Callable[..., Any]
HANDLERS: dict[Callable, Handler] = {}


def handles(*functions: Callable) -> Callable[[Handler], Handler]:
    """Register the rule for torch functions met on a `Signal`."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update({function: handler for function in functions})
        return handler

    return register


class Tracer:
    """The system under construction and the module that is running."""

    def __init__(self, is_complex: bool):
        self.system = System(is_complex=is_complex)
        self.path: list[str] = []
        self._linear: dict[tuple[int, int], int] = {}

    def where(self) -> str:
        return self.path[-1] if self.path else "the network itself"

    def refuse(self, what: str) -> NotCertifiable:
        return NotCertifiable(f"no sound bound is known for {what}, met in {self.where()}")


class Signal:
    """The increment of a tensor (1, *shape) between two runs of the network: a node of the traced system.

    Operations on it record; constants vanish, since only increments matter. An operation without a rule raises
    `NotCertifiable` with the operation and the module path.
    """

    def __init__(self, tracer: Tracer, node: int):
        self.tracer = tracer
        self.node = node
        self.shape = torch.Size((1, *tracer.system.nodes[node].shape))

    # -- recording ---------------------------------------------------------------------------------------------

    def linear(self, linear_map: LinearMap) -> Signal:
        """linear_map(self); the same map of the same value is one node."""
        if self.shape[1:] != linear_map.domain:
            raise ShapeError(f"{linear_map} takes {linear_map.domain}, given {tuple(self.shape[1:])}")
        key = (id(linear_map), self.node)
        memory = self.tracer._linear
        if key not in memory:
            memory[key] = self.tracer.system.append(Linear(linear_map, self.node, linear_map.codomain))
        return Signal(self.tracer, memory[key])

    def scaled(self, factor: Coefficient) -> Signal:
        return self.combined([(factor, self)])

    def combined(self, terms: Sequence[tuple[Coefficient, Signal]]) -> Signal:
        """sum of coefficient * signal, all of one shape."""
        shapes = {signal.shape for _, signal in terms}
        if len(shapes) > 1:
            raise self.tracer.refuse(f"a sum that broadcasts traced values of shapes {[tuple(s) for s in shapes]}")
        entries = tuple((coefficient, signal.node) for coefficient, signal in terms)
        return Signal(self.tracer, self.tracer.system.append(Sum(entries, tuple(self.shape[1:]))))

    def nonlinear(self, slope: Slope, structure: Structure = "separable") -> Signal:
        low, high = float(slope[0]), float(slope[1])
        if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
            raise self.tracer.refuse(f"a nonlinearity with slopes in [{low}, {high}]")
        node = Nonlinear(self.node, Slope(*slope), structure, self.tracer.where(), tuple(self.shape[1:]))
        return Signal(self.tracer, self.tracer.system.append(node))

    # -- looking like a tensor ---------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        import firmly.certificates.operations  # noqa: F401  (fills HANDLERS)

        signal = first_signal((args, kwargs or {}))
        if function not in HANDLERS:
            name = getattr(function, "__name__", repr(function))
            raise signal.tracer.refuse(f"the operation '{name}'")
        result = HANDLERS[function](signal.tracer, *args, **(kwargs or {}))
        if result is NotImplemented:
            name = getattr(function, "__name__", repr(function))
            raise signal.tracer.refuse(f"the operation '{name}' with these arguments")
        return result

    @property
    def dtype(self) -> torch.dtype:
        return torch.complex128 if self.tracer.system.is_complex else torch.float64

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    requires_grad = False
    layout = torch.strided
    is_cuda = False

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_complex(self) -> bool:
        return self.tracer.system.is_complex

    def is_floating_point(self) -> bool:
        return not self.is_complex()

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[arg-type]

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)  # type: ignore[arg-type]

    def __rsub__(self, other: Any) -> Any:
        return torch.sub(other, self)  # type: ignore[arg-type]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[arg-type]

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # type: ignore[arg-type]

    def __neg__(self) -> Any:
        return torch.neg(self)  # type: ignore[arg-type]

    def __pos__(self) -> Any:
        return self

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return HANDLERS_BY_METHOD("__getitem__")(self.tracer, self, index)

    def __iter__(self) -> Any:
        raise self.tracer.refuse("iterating over a traced value")

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise self.tracer.refuse("a decision that depends on the data")

    __float__ = __int__ = __index__ = __gt__ = __lt__ = __ge__ = __le__ = __bool__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__"):
            raise AttributeError(name)
        if not callable(method):
            raise self.tracer.refuse(f"the attribute '{name}' of a traced value")
        return lambda *args, **kwargs: Signal.__torch_function__(method, (Signal,), (self, *args), kwargs)


def HANDLERS_BY_METHOD(name: str) -> Handler:
    import firmly.certificates.operations  # noqa: F401  (fills HANDLERS)

    return HANDLERS[getattr(torch.Tensor, name)]


def first_signal(tree: Any) -> Signal:
    """The first `Signal` in nested arguments."""
    if isinstance(tree, Signal):
        return tree
    if isinstance(tree, (tuple, list)):
        found = [first_signal(item) for item in tree]
        return next((item for item in found if item is not None), None)  # type: ignore[return-value]
    if isinstance(tree, dict):
        return first_signal(list(tree.values()))
    return None  # type: ignore[return-value]


def trace(
    module: nn.Module,
    inputs: Mapping[str, Sequence[int]],
    wrt: Sequence[str],
    is_complex: bool = False,
    keep_gradients: bool = False,
) -> System:
    """The system of `module` for perturbations of the inputs named in `wrt`.

    `inputs` gives the shape (without batch) of every argument of `module.forward`; the first is passed by position.
    Inputs that are not in `wrt` are held at zero: the bounds hold for every value of theirs. The module is run in
    double precision on a copy, unless `keep_gradients` asks for a differentiable trace of the module itself.
    """
    traced = module if keep_gradients else copy.deepcopy(module).double()
    tracer = Tracer(is_complex)
    dtype = torch.complex128 if is_complex else torch.float64
    arguments: list[tuple[str, Signal | Tensor]] = []
    for name, shape in inputs.items():
        if name in wrt:
            node = tracer.system.append(Input(name, tuple(shape), is_complex))
            arguments.append((name, Signal(tracer, node)))
        else:
            arguments.append((name, torch.zeros(1, *shape, dtype=dtype)))
    with torch.set_grad_enabled(keep_gradients), module_paths(traced, tracer):
        result = traced(arguments[0][1], **dict(arguments[1:]))
    if isinstance(result, Tensor):
        raise NotCertifiable(
            f"the output does not depend on {list(wrt)}: its bound would be zero; ask for another input, "
            "or check that the network does not detach or ignore it"
        )
    if not isinstance(result, Signal):
        raise NotCertifiable(f"the network returns a {type(result).__name__}; a certificate needs one tensor")
    tracer.system.output = result.node
    return tracer.system.pruned()


@contextmanager
def module_paths(module: nn.Module, tracer: Tracer):
    """While it is open, `tracer.path` names the submodule that is running."""

    def enter(name: str) -> Callable:
        return lambda *_: tracer.path.append(name)

    hooks = []
    for name, child in module.named_modules():
        if name:
            hooks.append(child.register_forward_pre_hook(enter(f"'{name}' ({type(child).__name__})")))
            hooks.append(child.register_forward_hook(lambda *_: tracer.path.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
