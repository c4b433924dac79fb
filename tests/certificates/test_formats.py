"""Networks from files: the same bounds as the modules they were written from, or a refusal that lists everything."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firmly.certificates import trace
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.errors import DataError, NotCertifiable, SettingsError, StorageError
from firmly.lab.models import load_model

from .systems import Net, attained, blocks_of, double, system_of

onnx = pytest.importorskip("onnx")


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3), nn.Softmax(1))


def classifier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout()),
        *(Residual(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Hardswish()),
    )


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.LeakyReLU(), nn.ConvTranspose2d(2, 4, 2, stride=2),
        nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.Softplus(), nn.Upsample(scale_factor=2, mode="bilinear"),
    )  # fmt: skip


NETWORKS = {"perceptron": (perceptron, (4,)), "classifier": (classifier, (1, 8, 8)), "decoder": (decoder, (1, 4, 4))}


@pytest.fixture(params=NETWORKS)
def case(request) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    return net.eval(), shape


def bounds_of(net: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
    blocks = blocks_of(system_of(net, shape))
    return product_bound(blocks), averaged_bound(blocks)


# -- torch.export --------------------------------------------------------------------------------------------------


def exported(net: nn.Module, shape: tuple[int, ...], path: Path, dynamic: bool = False) -> Path:
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(net, (torch.rand(2 if dynamic else 1, *shape),), dynamic_shapes=sizes)
    torch.export.save(program, path)
    return path


def test_exported_programs_have_the_bounds_of_their_modules(case, tmp_path):
    net, shape = case
    dynamic = isinstance(net[-1], nn.Hardswish)  # a batch of any size
    loaded, _ = load_model(str(exported(net, shape, tmp_path / "net.pt2", dynamic)))
    assert list(loaded.inputs.values()) == [shape]
    x = torch.rand(1, *shape, **double)
    net = net.double()
    assert torch.allclose(loaded(x), net(x), rtol=0, atol=1e-12)
    assert bounds_of(loaded, shape) == pytest.approx(bounds_of(net, shape), rel=1e-12)
    assert attained(loaded, [shape], points=2) <= bounds_of(loaded, shape)[0]


def test_refusals_of_an_exported_program_name_the_modules_it_came_from(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Hardshrink(), nn.Linear(4, 2))
    loaded, _ = load_model(str(exported(net, (4,), tmp_path / "net.pt2")))
    with pytest.raises(NotCertifiable) as caught:
        trace(loaded, loaded.inputs, tuple(loaded.inputs))
    text = str(caught.value)
    assert "layer normalisation" in text and "'1' (LayerNorm)" in text
    assert "hardshrink" in text and "'3' (Hardshrink)" in text


def changed_archive(path: Path, replaced: dict[str, bytes]) -> Path:
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        names = [info.filename for info in old.infolist()]
        folder = names[0].partition("/")[0]
        for name in names:
            inner = name.partition("/")[2]
            new.writestr(name, replaced.pop(inner) if inner in replaced else old.read(name))
        for inner, data in replaced.items():
            new.writestr(f"{folder}/{inner}", data)
    path.write_bytes(content.getvalue())
    return path


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def archive(tmp_path) -> Path:
    return exported(nn.Linear(3, 2), (3,), tmp_path / "net.pt2")


def test_a_pickle_in_an_exported_program_is_never_loaded(archive, tmp_path):
    trap = tmp_path / "sprung"
    changed_archive(archive, {"data/sample_inputs/model.pt": pickle.dumps(Trap(trap))})
    loaded, _ = load_model(str(archive))
    assert loaded.inputs == {"input": (3,)}
    assert not trap.exists()


@pytest.mark.parametrize(
    "inner, data, reason",
    [
        ("data/aotinductor/model/code.so", b"", "compiled code"),
        ("data/constants/custom_obj_0", b"", "pickled objects"),
        ("data/weights/model_weights_config.json", b'{"config": {"w": {"use_pickle": true}}}', "are pickled"),
        ("models/model.json", b'{"a": {"expr_str": "__import__(\'os\').getcwd()"}}', "no operation and no size"),
        ("models/model.json", b'{"a": [{"target": "torch.os.system", "inputs": []}]}', "no operation and no size"),
        ("models/model.json", b'{"a": [{"target": "_operator.call", "inputs": []}]}', "no operation and no size"),
        ("models/model.json", b'{"a": [{"target": "torch.ops.aten.from_file.default", "inputs": []}]}', "no operation"),
        ("models/model.json", b"{", "complete archive"),
    ],
)
def test_foreign_content_of_an_exported_program_is_refused(archive, inner, data, reason):
    with pytest.raises(DataError, match=reason):
        load_model(str(changed_archive(archive, {inner: data})))


def test_two_files_of_one_name_are_refused(archive):
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(next(n for n in file.namelist() if n.endswith("model.json")), json.dumps({}))
    with pytest.raises(DataError, match="two files of one name"):
        load_model(str(archive))


def test_a_fixed_batch_larger_than_one_is_refused(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.rand(4, 3),)), tmp_path / "net.pt2")
    with pytest.raises(DataError, match="batch of one"):
        load_model(str(tmp_path / "net.pt2"))


# -- ONNX ----------------------------------------------------------------------------------------------------------


def graph(nodes, shape, output, weights: dict[str, Tensor], path: Path, opset: int = 20) -> Path:
    """An ONNX file with double precision weights, so that it is the network itself and not a rounding of it."""
    value = onnx.helper.make_tensor_value_info
    double_type = onnx.TensorProto.DOUBLE
    made = onnx.helper.make_graph(
        nodes, "net", [value("x", double_type, [1, *shape])], [value("y", double_type, output)],
        [onnx.numpy_helper.from_array(w.detach().numpy(), name) for name, w in weights.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def node(operator: str, inputs: str, output: str, **attributes):
    return onnx.helper.make_node(operator, inputs.split(), [output], name=f"{operator}_{output}", **attributes)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **double) / 3


def test_a_graph_of_layers_has_the_bounds_of_its_module(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3), nn.Tanh()).double()
    weights = {f"w{i}": net[i].weight for i in (0, 2)} | {f"b{i}": net[i].bias for i in (0, 2)}
    path = graph(
        [node("Gemm", "x w0 b0", "a", transB=1), node("Gelu", "a", "b"), node("Gemm", "b w2 b2", "c", transB=1),
         node("Tanh", "c", "y")],
        (4,), [1, 3], weights, tmp_path / "net.onnx",
    )  # fmt: skip
    loaded, _ = load_model(str(path))
    assert loaded.inputs == {"x": (4,)}
    x = torch.rand(1, 4, **double)
    assert torch.equal(loaded(x), net(x))
    assert bounds_of(loaded, (4,)) == pytest.approx(bounds_of(net, (4,)), rel=1e-12)


def test_a_residual_graph_of_convolutions_has_the_bounds_of_its_module(tmp_path):
    w, v, gain, shift = random(2, 1, 3, 3), random(2, 2, 3, 3), random(2).abs() + 0.5, random(2)
    mean, variance = random(2), random(2).abs() + 0.2

    def net(x):
        x = F.relu(F.batch_norm(F.conv2d(x, w, padding=1), mean, variance, gain, shift, eps=0.125))
        x = F.max_pool2d(x + F.conv2d(x, v, padding=1), 2)
        return F.leaky_relu(x.flatten(1), 0.25)

    path = graph(
        [node("Conv", "x w", "a", pads=[1, 1, 1, 1]), node("BatchNormalization", "a g s m v2", "b", epsilon=0.125),
         node("Relu", "b", "c"), node("Conv", "c v", "d", auto_pad="SAME_UPPER"), node("Add", "c d", "e"),
         node("MaxPool", "e", "f", kernel_shape=[2, 2], strides=[2, 2]), node("Flatten", "f", "g2"),
         node("LeakyRelu", "g2", "y", alpha=0.25)],
        (1, 6, 6), [1, 18], {"w": w, "v": v, "g": gain, "s": shift, "m": mean, "v2": variance}, tmp_path / "net.onnx",
    )  # fmt: skip
    loaded, _ = load_model(str(path))
    x = torch.rand(1, 1, 6, 6, **double)
    assert torch.allclose(loaded(x), net(x), rtol=0, atol=1e-14)
    assert bounds_of(loaded, (1, 6, 6)) == pytest.approx(bounds_of(Net(net), (1, 6, 6)), rel=1e-12)


# name: (nodes, weights); the input x is (1, 2, 4, 4) and the output y
OPERATORS = {
    "Gemm": ([("Flatten", "x", "a", {}), ("Gemm", "a w b", "y", {"alpha": 0.5, "beta": 2.0})],
             {"w": random(32, 3), "b": random(3)}),
    "Einsum": ([("Einsum", "x w", "y", {"equation": "bcij,jk->bcik"})], {"w": random(4, 3)}),
    "MatMul": ([("MatMul", "x w", "y", {})], {"w": random(4, 3)}),
    "Conv": ([("Conv", "x w b", "y", {"group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 0, 1]})],
             {"w": random(4, 1, 2, 2), "b": random(4)}),
    "ConvTranspose": ([("ConvTranspose", "x w", "y",
                        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]})],
                      {"w": random(2, 3, 3, 3)}),
    "Sub": ([("Sub", "c x", "y", {})], {"c": random(2, 1, 1)}),
    "Mul": ([("Mul", "x c", "y", {})], {"c": random(2, 1, 1)}),
    "Div": ([("Div", "x c", "y", {})], {"c": random(2, 4, 4) + 2.0}),
    "Reshape": ([("Reshape", "x s", "y", {})], {"s": torch.tensor([0, 4, -1])}),
    "Transpose": ([("Transpose", "x", "y", {"perm": [0, 3, 1, 2]})], {}),
    "Concat": ([("Neg", "x", "a", {}), ("Concat", "x a", "y", {"axis": 1})], {}),
    "Slice": ([("Slice", "x s e a t", "y", {})],
              {"s": torch.tensor([1, -1]), "e": torch.tensor([4, -5]), "a": torch.tensor([2, 3]),
               "t": torch.tensor([2, -1])}),
    "Pad": ([("Pad", "x p", "y", {})], {"p": torch.tensor([0, 0, 1, 0, 0, 0, 0, 2])}),
    "Pad reflect": ([("Pad", "x p", "y", {"mode": "reflect"})], {"p": torch.tensor([0, 0, 1, 0, 0, 0, 0, 2])}),
    "AveragePool": ([("AveragePool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})], {}),
    "GlobalAveragePool": ([("GlobalAveragePool", "x", "y", {})], {}),
    "MaxPool": ([("MaxPool", "x", "y", {"kernel_shape": [2, 2], "strides": [1, 1], "auto_pad": "SAME_UPPER"})], {}),
    "ReduceMean": ([("ReduceMean", "x a", "y", {"keepdims": 0})], {"a": torch.tensor([2, 3])}),
    "Split": ([("Split", "x", "a b", {"axis": 1, "num_outputs": 2}), ("Max", "a b", "y", {})], {}),
    "Gather": ([("Gather", "x i", "y", {"axis": 2})], {"i": torch.tensor([1, -1])}),
    "DepthToSpace": ([("Concat", "x x", "a", {"axis": 1}), ("DepthToSpace", "a", "y", {"blocksize": 2})], {}),
    "Resize": ([("Resize", "x  s", "y", {"mode": "linear"})], {"s": torch.tensor([1.0, 1.0, 2.0, 1.5])}),
    "Clip": ([("Clip", "x l h", "y", {})], {"l": torch.tensor(-0.25, **double), "h": torch.tensor(0.5, **double)}),
    "HardSigmoid": ([("HardSigmoid", "x", "y", {"alpha": 0.5, "beta": 0.25})], {}),
    "PRelu": ([("PRelu", "x s", "y", {})], {"s": torch.tensor([0.25, -0.5], **double).reshape(2, 1, 1)}),
    "Elu": ([("Elu", "x", "y", {"alpha": 1.5})], {}),
    "Softmax": ([("Softmax", "x", "y", {"axis": 1})], {}),
    "Shape": ([("Shape", "x", "s", {}), ("Reshape", "x s", "y", {})], {}),
    "silu written out": ([("Sigmoid", "x", "a", {}), ("Mul", "a x", "y", {})], {}),
    "mish written out": ([("Softplus", "x", "a", {}), ("Tanh", "a", "b", {}), ("Mul", "x b", "y", {})], {}),
    "gelu written out": ([("Div", "x r", "a", {}), ("Erf", "a", "b", {}), ("Add", "b one", "c", {}),
                          ("Mul", "x c", "d", {}), ("Mul", "d half", "y", {})],
                         {"r": torch.tensor(2.0, **double).sqrt(), "one": torch.tensor(1.0, **double),
                          "half": torch.tensor(0.5, **double)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compute_what_the_reference_of_onnx_computes(name, tmp_path):
    from onnx.reference import ReferenceEvaluator

    steps, weights = OPERATORS[name]
    nodes = [
        onnx.helper.make_node(operator, [n.strip() for n in inputs.split(" ")], outputs.split(), **attributes)
        for operator, inputs, outputs, attributes in steps
    ]
    path = graph(nodes, (2, 4, 4), None, weights, tmp_path / "net.onnx")
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), **double)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    loaded, _ = load_model(str(graph(nodes, (2, 4, 4), expected.shape, weights, path)))
    assert torch.allclose(loaded(x), torch.from_numpy(expected.copy()), rtol=1e-6, atol=1e-7)
    bound = product_bound(blocks_of(system_of(loaded, (2, 4, 4))))
    assert attained(loaded, [(2, 4, 4)], points=3) <= bound * (1 + 1e-9)


def test_all_operators_without_a_bound_are_listed_with_their_nodes(tmp_path):
    weights = {"g": random(4)}
    nodes = [
        node("LpNormalization", "x", "a", p=1),
        node("LayerNormalization", "a g", "b"),
        node("Det", "q", "unused"),
        node("Mul", "b b", "c"),
        node("Hardmax", "c", "y"),
    ]
    path = tmp_path / "net.onnx"
    graph(nodes[:2] + nodes[3:], (4,), [1, 4], weights, path)
    loaded, _ = load_model(str(path))
    with pytest.raises(NotCertifiable) as caught:
        trace(loaded, loaded.inputs, tuple(loaded.inputs))
    text = str(caught.value)
    assert "4 operations" in text
    for operator in ("LpNormalization_a", "LayerNormalization_b", "Mul_c", "Hardmax_y"):
        assert f"'{operator}'" in text
    with pytest.raises(NotCertifiable, match="LpNormalization is not known"):
        loaded(torch.rand(1, 4))


def test_what_does_not_reach_the_output_needs_no_bound(tmp_path):
    nodes = [node("Hardmax", "x", "unused"), node("Relu", "x", "y")]
    loaded, _ = load_model(str(graph(nodes, (4,), [1, 4], {}, tmp_path / "net.onnx")))
    assert bounds_of(loaded, (4,))[0] == pytest.approx(1.0)


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    (tmp_path / "net.pt2").write_bytes(b"no model")
    for name in ("net.onnx", "net.pt2"):
        with pytest.raises(DataError, match="cannot be read"):
            load_model(str(tmp_path / name))
    for name in ("none.onnx", "none.pt2"):
        with pytest.raises(StorageError):
            load_model(str(tmp_path / name))


# -- plain weights and pickles -------------------------------------------------------------------------------------


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_plain_weights_belong_to_a_factory(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    torch.manual_seed(5)
    net = build()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "\n\ndef other():\n    return nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded, origin = load_model("net.safetensors", "my_nets:build")
    assert origin is None
    assert bounds_of(loaded, (3,)) == bounds_of(net, (3,))
    with pytest.raises(DataError, match="does not belong"):
        load_model("net.safetensors", "my_nets:other")
    with pytest.raises(SettingsError, match="--model"):
        load_model("net.onnx", "my_nets:build")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl"])
def test_pickles_are_refused_with_what_to_do_instead(suffix, tmp_path):
    trap = tmp_path / "sprung"
    path = tmp_path / f"net{suffix}"
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(DataError, match="safetensors"):
        load_model(str(path))
    assert not trap.exists()
