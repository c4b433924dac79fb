"""Networks from files of `torch.export`: checked before anything is loaded, then run node by node."""

from __future__ import annotations

import io
import json
import logging
import operator
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.certificates.obstacles import located
from firmly.errors import DataError, NotCertifiable, StorageError

# -- reading without pickle ----------------------------------------------------------------------------------------

CONTENT = re.compile(
    r"(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|archive_format|archive_version|byteorder|version"
    r"|\.data/\w+|extra/.*)"
)
EXPRESSION = re.compile(  # sizes such as s0 + 1, also written Add(Symbol('s0', positive=True), Integer(1))
    r"(\b(Symbol|Add|Mul|Integer|Mod|FloorDiv|Pow|Max|Min|positive|nonnegative|integer|zero|True|False|[su]\d+)\b"
    r"|'[su]\d+'|[-+*/(),= \d])+"
)
ARITHMETIC = "getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge"  # of sizes; not operator.call
TARGET = re.compile(rf"torch\.ops\.\w+\.(?!from_file)\w+\.\w+|_operator\.({ARITHMETIC})")


def load_exported(path: Path) -> nn.Module:
    """The network of a `.pt2` file, written by `torch.export.save`, in double precision.

    Loading such a file can run code: torch unpickles some of its contents and evaluates expressions in it. So the file
    is looked through first, and refused with `DataError` if it holds anything but a graph of named operations, raw
    weights and sample inputs; these are a pickle, and are replaced by none.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_archive(archive)
            content = without_samples(archive)
    except (zipfile.BadZipFile, KeyError, ValueError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, DataError) else f"it is no complete archive ({error})"
        raise DataError(f"{path} cannot be read as a torch.export file: {reason}") from error
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    try:
        program = torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise DataError(f"{path} cannot be read by torch {torch.__version__}: {error}; export it again") from error
    return ExportedNetwork(program)


def check_archive(archive: zipfile.ZipFile) -> None:
    """Raise `DataError` unless loading the archive unpickles only tensors and evaluates only sizes."""
    names = {info.filename.partition("/")[2]: info.filename for info in archive.infolist()}
    folders = {info.filename.partition("/")[0] for info in archive.infolist()}
    if len(names) < len(archive.infolist()) or len(folders) != 1:
        raise DataError("it holds two files of one name, or more than one folder")
    if "models/model.json" not in names:
        raise DataError("it holds no models/model.json; write it with torch.export.save of a recent torch")
    foreign = sorted(name for name in names if not CONTENT.fullmatch(name))
    if foreign:
        raise DataError(f"it holds {foreign[:3]}: compiled code and pickled objects are not loaded")
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(names[f"data/{kind}/model_{kind}_config.json"]))
        pickled = [name for name, entry in config.get("config", {}).items() if entry.get("use_pickle", True)]
        if pickled:
            raise DataError(f"the {kind} {pickled[:3]} are pickled; save plain tensors, or give the file as ONNX")
    for key, value in entries(json.loads(archive.read(names["models/model.json"]))):
        allowed = {"expr_str": EXPRESSION, "target": TARGET}.get(key)
        if allowed is not None and isinstance(value, str) and not allowed.fullmatch(value):
            raise DataError(f"its graph names {value[:60]!r}, which is no operation and no size that is known here")


def without_samples(archive: zipfile.ZipFile) -> bytes:
    """The archive with a pickle of our own, of nothing, in the place of its sample inputs."""
    none, content = io.BytesIO(), io.BytesIO()
    torch.save(((), {}), none)
    with zipfile.ZipFile(content, "w") as clean:
        for name in archive.namelist():
            sample = name.partition("/")[2] == "data/sample_inputs/model.pt"
            clean.writestr(name, none.getvalue() if sample else archive.read(name))
    return content.getvalue()


def entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """All pairs of key and value in nested JSON; the keys "target" of nodes only."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key != "target" or "inputs" in tree:
                yield key, value
            yield from entries(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from entries(item)


# -- running -------------------------------------------------------------------------------------------------------


class ExportedNetwork(nn.Module):
    """The graph of an exported program, run node by node in double precision, on tensors or on traced values.

    `inputs` gives the names and shapes (without batch) of its arguments.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        tensors: dict[str, Any] = {**program.constants, **program.state_dict}
        signature = program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        sources |= signature.inputs_to_lifted_tensor_constants
        self.nodes: list[torch.fx.Node] = list(program.graph.nodes)
        self.held: dict[str, str] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            if node.name in sources:
                self.held[node.name] = f"tensor_{len(self.held)}"
                value = tensors[sources[node.name]].detach()
                self.register_buffer(self.held[node.name], value.double() if value.is_floating_point() else value)
            else:
                self.inputs[node.name] = input_shape(node)
        self.functions = {node.name: python_function(node.target) for node in self.nodes if node.op == "call_function"}

    def __deepcopy__(self, memo: dict) -> ExportedNetwork:
        return self  # its graph cannot be copied, and nothing in it changes

    def forward(self, *given: Any, **named: Any) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, given)) | named
        values = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
        for node in self.nodes:
            if node.name in self.held:
                values[node.name] = getattr(self, self.held[node.name])
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
                with located(place_of(node), (list(args), kwargs)):
                    values[node.name] = self.functions[node.name](*widened(args), **widened(kwargs))
            elif node.op == "output":
                results = torch.fx.node.map_arg(node.args[0], lambda n: values[n.name])
                return results[0] if isinstance(results, (tuple, list)) and len(results) == 1 else results
        raise DataError("the exported graph has no output")


def input_shape(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise DataError(f"the input '{node.name}' of the exported graph is no tensor with a batch")
    batch, *shape = (n if isinstance(n, int) else getattr(n.node, "hint", None) for n in value.shape)
    if isinstance(value.shape[0], int) and batch != 1:
        raise DataError(f"the graph was exported for a batch of {batch}; export it with a batch of one")
    return tuple(int(n) for n in shape)


def place_of(node: torch.fx.Node) -> str:
    """The module that a node came from, as the exporter wrote it down, else the node itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"'{path}' ({kind.rpartition('.')[2]})" if path else f"'{node.name}'"


def widened(tree: Any) -> Any:
    """The same arguments, with double precision wherever a floating-point type is asked for."""
    if isinstance(tree, torch.dtype):
        return torch.float64 if tree.is_floating_point else tree
    if isinstance(tree, dict):
        return {key: widened(value) for key, value in tree.items() if key not in ("device", "layout", "pin_memory")}
    return type(tree)(widened(value) for value in tree) if isinstance(tree, (tuple, list)) else tree


# -- operations ----------------------------------------------------------------------------------------------------


def python_function(target: Any) -> Callable:
    """What runs in the place of an operation of the graph: the function of torch that the tracer knows."""
    if target in (getattr(operator, name) for name in ARITHMETIC.split("|")):
        return target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return unknown_operation(str(target))
    name = target.overloadpacket.__name__
    if name in SPECIAL:
        return SPECIAL[name]
    known = tracer_rule(name)
    if known is None and name.endswith("_") and not name.endswith("__"):
        known = tracer_rule(name[:-1])
        if known is not None:
            return in_place(known)
    return known or aten_operation(target)


def tracer_rule(name: str) -> Callable | None:
    """The function called `name` that has a rule for traced values, if there is one."""
    import firmly.certificates.operations  # noqa: F401  (fills HANDLERS)
    from firmly.certificates.signal import HANDLERS

    found = (getattr(room, name, None) for room in (torch, F, torch.Tensor))
    return next((function for function in found if function in HANDLERS), None)


def in_place(function: Callable) -> Callable:
    """relu_ and its like: the result replaces the value of the first argument."""

    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(x, *args, **kwargs)
        return x.copy_(result) if isinstance(x, Tensor) else x.overwritten(result)

    return run


def aten_operation(target: Any) -> Callable:
    """An operation without a rule: run on tensors, and refused under its own name on traced values."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return run


def unknown_operation(name: str) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(run, args, *args, **kwargs)
        raise NotCertifiable(f"the operation '{name}' of the exported graph is none of torch's own")

    run.__name__ = name
    return run


def batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any) -> Any:
    return F.batch_norm(x, mean, variance, weight, bias, training, *rest[:2])


def instance_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Any:
    return F.instance_norm(x, mean, variance, weight, bias, *rest[:3])


def same_values(x: Any, *args: Any, **kwargs: Any) -> Any:
    """A change of precision, device or memory: all runs in double precision, on the CPU."""
    dtype = next((a for a in [*args, *kwargs.values()] if isinstance(a, torch.dtype)), torch.float64)
    return x if dtype.is_floating_point and x.is_floating_point() else x.to(dtype)


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def upsample(mode: str, corners: bool) -> Callable:
    def run(x: Any, size: Any, *rest: Any) -> Any:
        align = rest[0] if corners else None
        factors = rest[1 if corners else 0] if len(rest) > corners else None
        size = None if size is None else list(size)
        factors = None if size is not None or factors is None else list(factors)
        return F.interpolate(x, size, factors, mode, align)

    return run


SPECIAL: dict[str, Callable] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "pad": F.pad,
    "to": same_values,
    "_to_copy": same_values,
    "contiguous": same_values,
    "alias": same_values,
    "lift_fresh_copy": same_values,
    "detach_": same_values,
    "_assert_tensor_metadata": nothing,
    "_assert_scalar": nothing,
    "sym_constrain_range_for_size": nothing,
    "sym_size": lambda x, dim: x.shape[dim],
    "upsample_nearest1d": upsample("nearest", False),
    "upsample_nearest2d": upsample("nearest", False),
    "upsample_nearest3d": upsample("nearest", False),
    "upsample_linear1d": upsample("linear", True),
    "upsample_bilinear2d": upsample("bilinear", True),
    "upsample_trilinear3d": upsample("trilinear", True),
    "upsample_bicubic2d": upsample("bicubic", True),
    "silu": F.silu,
    "layer_norm": lambda x, shape, weight=None, bias=None, eps=1e-5, *_: F.layer_norm(x, shape, weight, bias, eps),
    "group_norm": lambda x, groups, weight=None, bias=None, eps=1e-5, *_: F.group_norm(x, groups, weight, bias, eps),
}
