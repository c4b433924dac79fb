"""Networks from ONNX files: the graph run node by node with torch, on tensors or on traced values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.certificates.obstacles import located
from firmly.errors import DataError, NotCertifiable, SettingsError, StorageError
from firmly.lab.onnx_operators import OPERATORS
from firmly.lab.onnx_patterns import recognised
from firmly.lab.onnx_shapes import UnknownOperator


def load_onnx(path: Path) -> nn.Module:
    """The network of an ONNX file, in double precision; needs the extra `onnx`.

    Raises `DataError` for a damaged file. Operators that are not known here are refused when the network is certified
    or run, together with all others that stand in the way of a certificate.
    """
    try:
        import onnx
    except ImportError as error:
        raise SettingsError("ONNX files need the package onnx: pip install 'firmly[onnx]'") from error
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
    except FileNotFoundError as error:
        raise StorageError(f"there is no file {path}") from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as an ONNX model: {error}") from error
    return OnnxNetwork(model)


class OnnxNetwork(nn.Module):
    """An ONNX graph as a module. `inputs` gives the names and shapes (without batch) of its inputs, where they are
    fixed."""

    def __init__(self, model: Any):
        super().__init__()
        import onnx

        graph = model.graph
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.held: dict[str, str] = {}
        for tensor in graph.initializer:
            self.hold(tensor.name, onnx.numpy_helper.to_array(tensor))
        self.names = [value.name for value in graph.input if value.name not in self.held]
        self.inputs = known_shapes([value for value in graph.input if value.name in self.names])
        if self.inputs is None:
            del self.inputs  # `certify` then asks for the shape
        shapes = {value.name: dimensions(value) for value in [*graph.value_info, *graph.output]}
        self.nodes: list[Node] = []
        for index, node in enumerate(graph.node):
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                self.hold(node.output[0], constant(attributes))
                continue
            if any(isinstance(v, onnx.GraphProto) for v in attributes.values()):
                attributes = {}  # loops and branches are unknown operators
            attributes = {k: plain(v) for k, v in attributes.items()}
            place = f"'{node.name or f'node {index}'}' ({node.op_type})"
            if node.op_type == "Softmax" and self.opset < 13:
                attributes = {"axis": 1, "flattens": True} | attributes
            known = [shapes.get(name) for name in node.output]
            self.nodes.append(Node(node.op_type, place, attributes, list(node.input), list(node.output), known))
        if len(graph.output) != 1:
            raise DataError(f"the graph has {len(graph.output)} outputs; a certificate needs one tensor")
        self.output = graph.output[0].name
        self.recognise_activations()
        self.drop_unused()

    def recognise_activations(self) -> None:
        made_by = {name: node for node in self.nodes for name in node.outputs}
        for index, node in enumerate(self.nodes):
            if found := recognised(node, made_by, self.number):
                self.nodes[index] = Node(found[0], node.place, {}, found[1], node.outputs, node.shapes)

    def drop_unused(self) -> None:
        """Leave out what does not reach the output: it needs no bound."""
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]

    def number(self, name: str) -> float | None:
        value = getattr(self, self.held[name]) if name in self.held else None
        return float(value) if value is not None and value.numel() == 1 else None

    def hold(self, name: str, array: Any) -> None:
        value = torch.from_numpy(array.copy()) if hasattr(array, "dtype") else torch.as_tensor(array)
        self.held[name] = f"tensor_{len(self.held)}"
        self.register_buffer(self.held[name], value.double() if value.is_floating_point() else value)

    def forward(self, *given: Any, **named: Any) -> Any:
        values: dict[str, Any] = dict(zip(self.names, given)) | named
        values = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
        values |= {name: getattr(self, buffer) for name, buffer in self.held.items()}
        for node in self.nodes:
            node(values)
        return values[self.output]


@dataclass(frozen=True)
class Node:
    """One operation of the graph; `shapes` are those of its outputs, as far as they are known."""

    operator: str
    place: str
    attributes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    shapes: list[list[int] | None]

    def __call__(self, values: dict[str, Any]) -> None:
        """Run on `values`, and store the results there."""
        given = [values[name] if name else None for name in self.inputs]
        with located(self.place, [given]):
            try:
                if self.operator not in OPERATORS:
                    raise UnknownOperator(self.operator)
                result = OPERATORS[self.operator](*given, **self.attributes)
            except UnknownOperator as unknown:
                result = unknown_operator(str(unknown), self.shapes)(*given)
        several = isinstance(result, (tuple, list))
        values.update(zip(self.outputs, result if several else [result]))


def unknown_operator(operator: str, shapes: list[list[int] | None]) -> Callable:
    """What has no meaning here; of known shape, so that a trace can look for what else stands in the way."""

    def run(*args: Any, **attributes: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(run, args, *args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors and all(t.is_meta for t in tensors) and all(shape is not None for shape in shapes):
            results = [torch.empty([1, *(shape or [1])[1:]], device="meta") for shape in shapes]
            return results[0] if len(results) == 1 else results
        raise NotCertifiable(f"the ONNX operator {operator} is not known here")

    run.__name__ = f"{operator} (no ONNX operator that is known here)"
    return run


def known_shapes(values: list[Any]) -> dict[str, tuple[int, ...]] | None:
    found = {}
    for value in values:
        shape = dimensions(value)
        if shape is None or len(shape) == 0 or shape[0] > 1:
            raise DataError(f"the input '{value.name}' has shape {shape}; export the network with a batch of one")
        if any(n < 1 for n in shape[1:]):
            return None
        found[value.name] = tuple(shape[1:])
    return found


def dimensions(value: Any) -> list[int] | None:
    """The shape of a value, 0 where it is not fixed; None if not even the number of axes is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def constant(attributes: dict[str, Any]) -> Any:
    import onnx

    value = next(iter(attributes.values()))
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else torch.as_tensor(value)


def plain(value: Any) -> Any:
    import onnx

    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    return value
