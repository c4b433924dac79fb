"""Symbolic inputs: run a module on a `Signal` and get its `System`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates.obstacles import PREFIX, refusal, step_over
from firmly.certificates.replay import at_point, on_tensors, shapes_of
from firmly.certificates.running import module_paths
from firmly.certificates.system import Call, Coefficient, Input, Linear, Loop, Nonlinear, Sum, System
from firmly.errors import NotCertifiable, ShapeError
from firmly.linear.map import LinearMap
from firmly.prox.prior import Slope, Structure

Handler = Callable[..., Any]
HANDLERS: dict[Callable, Handler] = {}
JOINS: set[Callable] = set()
VIEWS: set[Callable] = set()


def handles(*functions: Callable, joins: bool = False, views: bool = False) -> Callable[[Handler], Handler]:
    """Register the rule for torch functions met on a `Signal`.

    Only a rule that `joins` may be given several traced values; for the others all but the first tensor are constants.
    A rule that `views` gives a result that may share its memory with the argument.
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update({function: handler for function in functions})
        JOINS.update(functions if joins else ())
        VIEWS.update(functions if views else ())
        return handler

    return register


class Tracer:
    """The system under construction and the module that is running."""

    def __init__(self, is_complex: bool):
        self.system = System(is_complex=is_complex)
        self.path: list[str] = []
        self.obstacles: list[str] = []
        self.running: tuple[Callable, tuple, dict] | None = None  # the operation that is being recorded
        self._linear: dict[tuple[int, int], int] = {}

    def where(self) -> str:
        return self.path[-1] if self.path else "the network itself"

    def refuse(self, what: str) -> NotCertifiable:
        return NotCertifiable(f"{PREFIX}{what}, met in {self.where()}")


class Memory:
    """Counts how often the memory behind some signals was written over in place."""

    def __init__(self) -> None:
        self.version = 0


class Signal:
    """The increment of a tensor (1, *shape) between two runs of the network: a node of the traced system.

    Operations on it record; constants vanish, since only increments matter. An operation without a rule raises
    `NotCertifiable` with the operation and the module path. As with tensors, an operation in place changes all views
    of the same memory; the views are refused from then on, since they are no longer what was recorded. `value` is the
    tensor itself in the first of the two runs, if the trace was made around a point.
    """

    def __init__(self, tracer: Tracer, node: int, memory: Memory | None = None, value: Tensor | None = None):
        self.tracer = tracer
        self.value = value
        self.shape = torch.Size((1, *tracer.system.nodes[node].shape))
        self._node = node
        self._memory = Memory() if memory is None else memory
        self._version = self._memory.version

    @property
    def node(self) -> int:
        if self._version != self._memory.version:
            raise self.tracer.refuse("a value that an operation on another view of its memory has changed in place")
        return self._node

    # -- recording ---------------------------------------------------------------------------------------------

    def linear(self, linear_map: LinearMap) -> Signal:
        """linear_map(self); the same map of the same value is one node."""
        if linear_map.is_complex and not self.is_complex():
            raise self.tracer.refuse("complex weights in a network taken as real (use complex maps of firmly.linear)")
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

    def nonlinear(self, slope: Slope, structure: Structure = "separable", loop: Loop | None = None) -> Signal:
        """R(self) with slopes of R as given; or, with a `loop`, its solution, of which they are the outer view."""
        low, high = float(slope[0]), float(slope[1])
        if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
            raise self.tracer.refuse(f"a nonlinearity with slopes in [{low}, {high}]")
        call = None
        if self.value is not None and self.tracer.running is not None and loop is None:
            call = Call(*self.tracer.running, self.value)
        node = Nonlinear(self.node, Slope(*slope), structure, self.tracer.where(), tuple(self.shape[1:]), call, loop)
        return Signal(self.tracer, self.tracer.system.append(node))

    def overwritten(self, value: Signal) -> Signal:
        """This signal after an operation in place whose result is `value`."""
        if value.shape != self.shape:
            raise self.tracer.refuse("an operation in place that changes the shape")
        self._node, self.value = value.node, value.value
        self._memory.version += 1
        self._version = self._memory.version
        return self

    # -- looking like a tensor ---------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        import firmly.certificates.operations  # noqa: F401  (fills HANDLERS)

        kwargs = kwargs or {}
        signals = signals_in((args, kwargs))
        try:
            return at_point(cls._recorded(function, signals, args, kwargs), signals, function, args, kwargs)
        except NotCertifiable as error:
            return step_over(error, signals[0], function, args, kwargs)

    @staticmethod
    def _recorded(function: Callable, signals: list[Signal], args: tuple, kwargs: dict) -> Any:
        tracer = signals[0].tracer
        name = getattr(function, "__name__", repr(function))
        if function not in HANDLERS:
            raise tracer.refuse(f"the operation '{name}'")
        operands = [a for a in args if isinstance(a, (Signal, Tensor))]
        if function not in JOINS and (len(signals) > 1 or operands[0] is not signals[0]):
            raise tracer.refuse(f"the operation '{name}' with weights or parameters that depend on the input")
        tracer.running = (function, args, kwargs)
        try:
            result = HANDLERS[function](tracer, *args, **kwargs)
        except TypeError as error:
            raise tracer.refuse(f"the operation '{name}' with these arguments ({error})") from error
        if result is NotImplemented:
            raise tracer.refuse(f"the operation '{name}' with these arguments")
        if not (getattr(function, "__module__", None) or "").startswith("firmly"):  # maps and proxes know their shapes
            recorded, real = shapes_of(result), shapes_of(on_tensors(function, args, kwargs, signals[0].dtype))
            if any(ours is not None and ours != theirs for ours, theirs in zip(recorded, real, strict=True)):
                raise tracer.refuse(
                    f"the operation '{name}' with these shapes: a result {real} was traced as {recorded}"
                )
        if kwargs.get("inplace"):
            before = signals[0].value
            signals[0].overwritten(result).value = before  # from which `at_point` finds the new one
            return signals[0]
        if function not in VIEWS:
            return result if isinstance(result, tuple) else Signal(tracer, result.node)
        if isinstance(result, tuple):
            return tuple(Signal(tracer, part.node, signals[0]._memory) for part in result)
        return Signal(tracer, result.node, signals[0]._memory)

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

    def __iadd__(self, other: Any) -> Any:
        return self.overwritten(self + other)

    def __isub__(self, other: Any) -> Any:
        return self.overwritten(self - other)

    def __imul__(self, other: Any) -> Any:
        return self.overwritten(self * other)

    def __itruediv__(self, other: Any) -> Any:
        return self.overwritten(self / other)

    def __getitem__(self, index: Any) -> Any:
        return Signal.__torch_function__(torch.Tensor.__getitem__, (Signal,), (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self.tracer.refuse("writing into a part of a traced value")

    def __iter__(self) -> Any:
        raise self.tracer.refuse("iterating over a traced value")

    def __len__(self) -> int:
        return self.shape[0]

    def __abs__(self) -> Any:
        return torch.abs(self)  # type: ignore[arg-type]

    def __pow__(self, *_: Any) -> Any:
        error = self.tracer.refuse("a power, reciprocal, remainder or logical combination of a traced value")
        return step_over(error, self, torch.abs, (self,), {})

    __rpow__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__
    __and__ = __or__ = __xor__ = __invert__ = __pow__

    def __bool__(self, *_: Any) -> bool:
        raise self.tracer.refuse("a decision that depends on the data")

    __float__ = __int__ = __index__ = __complex__ = __bool__  # type: ignore[assignment]
    __gt__ = __lt__ = __ge__ = __le__ = __eq__ = __ne__ = __bool__  # type: ignore[assignment]
    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy leaves arithmetic with numbers of its own to this class

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__"):
            raise AttributeError(name)
        if not callable(method):
            raise self.tracer.refuse(f"the attribute '{name}' of a traced value")
        return lambda *args, **kwargs: Signal.__torch_function__(method, (Signal,), (self, *args), kwargs)


def signals_in(tree: Any) -> list[Signal]:
    """Every `Signal` in nested arguments."""
    if isinstance(tree, Signal):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [signal for item in tree for signal in signals_in(item)] if isinstance(tree, (tuple, list)) else []


def trace(
    module: nn.Module,
    inputs: Mapping[str, Sequence[int]],
    wrt: Sequence[str],
    is_complex: bool = False,
    keep_gradients: bool = False,
    around: Mapping[str, Tensor] | None = None,
) -> System:
    """The system of `module` for perturbations of the inputs named in `wrt`.

    `inputs` gives the shape (without batch) of arguments of `module.forward`; the first is passed by position. An
    argument that is not in `wrt` is left to its default if it has one, else it is held fixed at an unknown value. The
    module is run in double precision on a copy, unless `keep_gradients` asks for a differentiable trace of the module
    itself. `around` gives the arguments (1, *shape) at a point, the first one first, and the nonlinearities keep their
    inputs there. Raises `NotCertifiable` with the list of all operations that no bound is known for.
    """
    traced = module if keep_gradients else copy.deepcopy(module).double().cpu()
    tracer = Tracer(is_complex)
    given = arguments(module, inputs, wrt) if around is None else list(around)
    signals = {}
    for name in given:
        node = tracer.system.append(Input(name, tuple(inputs[name]), is_complex))
        signals[name] = Signal(tracer, node, value=None if around is None else around[name])
    try:
        with torch.set_grad_enabled(keep_gradients), module_paths(traced, tracer.path):
            result = traced(signals.pop(given[0]), **signals)
    except Exception as error:
        if not tracer.obstacles:
            raise
        if isinstance(error, NotCertifiable):
            tracer.obstacles.append(str(error))
        raise refusal(tracer.obstacles, stopped=True) from error
    if tracer.obstacles:
        raise refusal(tracer.obstacles, stopped=False)
    if isinstance(result, Tensor):
        raise NotCertifiable(UNMOVED.format(list(wrt)))
    if not isinstance(result, Signal):
        raise NotCertifiable(f"the network returns a {type(result).__name__}; a certificate needs one tensor")
    tracer.system.output = result.node
    system = tracer.system.held_fixed([name for name in given if name not in wrt])
    if system is None:
        raise NotCertifiable(UNMOVED.format(list(wrt)))
    return system


UNMOVED = (
    "the output does not depend on {}: its bound would be zero; ask for another input, "
    "or check that the network does not detach or ignore it"
)


def arguments(module: nn.Module, inputs: Mapping[str, Sequence[int]], wrt: Sequence[str]) -> list[str]:
    """The inputs that the network is given: the first, those in `wrt`, and those without a default."""
    if not inputs:
        raise ShapeError("a network without inputs has nothing to certify: give the shape of at least one")
    known = inspect.signature(module.forward).parameters
    first = next(iter(inputs))
    optional = {name for name, p in known.items() if p.default is not inspect.Parameter.empty}
    return [name for name in inputs if name == first or name in wrt or name not in optional]
