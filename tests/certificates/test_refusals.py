"""What has no sound bound is refused, with the operation and the place; what torch does in place is followed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firmly import certify, unroll
from firmly.algorithms import ForwardBackward
from firmly.errors import FirmlyError, NotCertifiable, NotDiagonal, ShapeError
from firmly.linear import Convolution, Dense, FourierBasis, FourierSampling
from firmly.prox import L1, NonNegative

from .systems import Net, all_bounds, attained, blocks_of, bounds, double, exact, system_of

EYE = torch.eye(3, **double)

REFUSED = {
    "positions of maxima": lambda x: x[:, x.max(1).indices],
    "product with a position": lambda x: x * x.max(1)[1],
    "order of a sort": lambda x: torch.gather(x, 1, torch.sort(x)[1]),
    "where that broadcasts": lambda x: torch.where(torch.tensor([[True]]), x[:, :1], torch.zeros(1, 3, **double)),
    "where that chooses by the data": lambda x: torch.where(x.abs(), x, 0.0),
    "matrix product that adds an axis": lambda x: (x @ torch.ones(1, 3, 2, **double)).sum(1),
    "mean over the batch": lambda x: x.mean(0, keepdim=True) - x,
    "variance": lambda x: x.var(1, keepdim=True),
    "norm": lambda x: x.norm(),
    "cumulative product": lambda x: x.cumprod(1),
    "product with itself": lambda x: x * x,
    "product with a function of itself": lambda x: x * torch.sigmoid(x),
    "matrix product with itself": lambda x: x @ x.T,
    "einsum of samples": lambda x: torch.einsum("bi,ij->j", x, EYE),
    "layer norm": lambda x: F.layer_norm(x, (3,)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "branch on a comparison": lambda x: x if x.sum() > 0 else -x,
    "branch on an entry": lambda x: x if x[:, :1] > 0 else -x,
    "branch on equality": lambda x: x if x == 0 else -x,
    "branch on inequality": lambda x: x if x != 0 else -x,
    "branch on truth": lambda x: x if x else -x,
    "item": lambda x: x * x[0, 0].item(),
    "float": lambda x: x * float(x[:, :1]),
    "numpy": lambda x: torch.as_tensor(np.asarray(x)),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "data": lambda x: x.data * 2,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked fill": lambda x: x.masked_fill(x > 0, 0.0),
    "assignment to a part": lambda x: x.__setitem__((0, 0), 0.0),
    "assignment into a constant": lambda x: torch.zeros(1, 3, **double).__setitem__((0, slice(None)), x),
    "addition to a constant in place": lambda x: torch.zeros(1, 3, **double).add_(x),
    "iteration": lambda x: sum(x),
    "bias from the input": lambda x: F.linear(x, EYE, x[0]),
    "weight from the input": lambda x: F.linear(x, EYE * x),
    "weight of a constant": lambda x: F.linear(torch.ones(1, 3, **double), EYE, x),
    "negative slope from the input": lambda x: F.leaky_relu(x, x[:, :1]),
    "step from the input": lambda x: L1(1.0).prox(x, x[:, :1]),
    "threshold from the input": lambda x: torch.clamp(x, min=x),
    "complex factor": lambda x: x * 1j,
    "complex tensor": lambda x: x * torch.tensor(1j),
    "array factor": lambda x: x + np.ones(3),
    "random like": lambda x: x * torch.rand_like(x),
    "addition that broadcasts": lambda x: x[:, :1] + x,
    "constant that broadcasts": lambda x: x[:, :1] + torch.ones(3, **double),
    "factor that broadcasts": lambda x: x[:, :1] * torch.ones(3, **double),
    "more samples": lambda x: x + torch.ones(5, 3, **double),
    "concatenation of samples": lambda x: torch.cat([x, x], 0),
    "samples to features": lambda x: x.T,
    "flat": lambda x: x.flatten(0),
    "list of outputs": lambda x: [x, x],
    "no output": lambda x: None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises((NotCertifiable, TypeError) if name == "array factor" else NotCertifiable):
        system_of(Net(REFUSED[name]), (3,))


@pytest.mark.parametrize(
    "function", [lambda x: torch.ones(1, 3, **double), lambda x: EYE[:1], lambda x: torch.zeros(x.shape, **double)]
)
def test_an_output_that_ignores_the_input_is_refused(function):
    with pytest.raises(NotCertifiable, match="does not depend"):
        system_of(Net(function), (3,))


class Inner(nn.Module):
    def forward(self, x):
        return torch.exp(x)


def test_the_message_names_operation_and_module():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Inner()))
    with pytest.raises(NotCertifiable, match=r"'exp'.*'1\.1' \(Inner\)"):
        certify(net, shape=(3,))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.AlphaDropout(0.2)])
def test_dropout_in_training_is_refused(layer):
    net = nn.Sequential(nn.Conv2d(1, 1, 1), layer)
    with pytest.raises(NotCertifiable, match="eval"):
        certify(net.train(), shape=(1, 2, 2))
    assert certify(net.eval(), shape=(1, 2, 2)).upper > 0


def test_batch_norm_in_training_or_without_statistics_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(NotCertifiable, match="eval"):
        certify(net.train(), shape=(1, 2, 2))
    assert certify(net.eval(), shape=(1, 2, 2)).upper > 0
    unknown = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    with pytest.raises(NotCertifiable):
        certify(unknown, shape=(1, 2, 2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2), nn.MaxPool1d(2, return_indices=True),
        nn.Hardshrink(), nn.Threshold(0.1, 0.0), nn.GLU(), nn.Softmin(-1), nn.LogSoftmax(-1), nn.RReLU(),
        nn.Bilinear(4, 4, 2), nn.LSTM(4, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 1), nn.Embedding(3, 4),
        nn.TransformerEncoderLayer(4, 1), nn.CosineSimilarity(), nn.LPPool1d(2, 2), nn.RMSNorm(4),
        nn.LocalResponseNorm(1), nn.Fold((2, 2), (1, 1)),
        nn.Conv1d(2, 2, 3, padding="same", padding_mode="reflect", dilation=9),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_modules_without_a_rule_are_refused_and_never_ignored(layer):
    """Whatever is raised, it is raised: a bound of a network without this layer would be the unforgivable bug."""
    with pytest.raises((FirmlyError, TypeError, ValueError, RuntimeError, AttributeError)):
        system_of(Net(lambda x: layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x), layer.double()), (2, 4))


def test_weights_that_are_not_finite_are_refused():
    for value in (float("nan"), float("inf")):
        linear = nn.Linear(3, 3)
        nn.init.constant_(linear.weight, value)
        with pytest.raises(NotCertifiable):
            certify(nn.Sequential(linear, nn.ReLU()), shape=(3,))
        with pytest.raises(NotCertifiable):
            certify(Net(lambda x, v=value: torch.relu(x) * v), shape=(3,))


def test_a_network_of_random_weights_is_caught():
    """Its trace is that of one draw; the attained pair betrays it."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(NotCertifiable, match="random"):
        certify(Net(lambda x: x * torch.rand(3, generator=generator, **double).cumsum(0)), shape=(3,))


# -- other inputs --------------------------------------------------------------------------------------------------


def test_an_input_held_fixed_may_take_every_value():
    """A product with it has no bound, although it would be zero at zero."""
    shapes = {"x": (3,), "y": (3,)}
    with pytest.raises(NotCertifiable, match="product"):
        system_of(Net(lambda x, y: x * y), shapes, ("x",))
    with pytest.raises(NotCertifiable, match="depend on the input"):
        system_of(Net(lambda x, y: F.linear(x, EYE, y)), shapes, ("x",))
    with pytest.raises(NotCertifiable):
        system_of(Net(lambda x, y: x if y.sum() > 0 else -x), shapes, ("x",))
    with pytest.raises(NotCertifiable):
        system_of(Net(lambda x, y: L1(1.0).prox(x, y)), shapes, ("x",))


def test_an_input_held_fixed_drops_out_of_sums():
    shapes = {"x": (3,), "y": (3,)}
    system = system_of(Net(lambda x, y: torch.relu(2.0 * x + torch.relu(y)) - y), shapes, ("x",))
    assert [node.name for node in system.inputs] == ["x"]
    assert exact(blocks_of(system)) == pytest.approx(2.0)
    with pytest.raises(NotCertifiable, match="does not depend"):
        system_of(Net(lambda x, y: torch.relu(y) + 0.0 * torch.relu(y)), shapes, ("x",))


def test_an_argument_with_a_default_is_left_to_it():
    def forward(x, y=None):
        return x + 3.0 * (x if y is None else y)

    shapes = {"x": (3,), "y": (3,)}
    net = Net(forward)
    net.forward = forward  # the signature that a module shows
    assert bounds(net, shapes, ("x",))["product"] == pytest.approx(4.0)
    assert bounds(net, shapes, ("y",))["product"] == pytest.approx(3.0)
    assert bounds(net, shapes, ("x", "y"))["product"] == pytest.approx(10**0.5)


# -- in place ------------------------------------------------------------------------------------------------------


def in_place_alias(x):
    y = x * 1.0
    z = y
    z += 2.0 * torch.relu(x)
    return y


def in_place_activation(x):
    y = x * 1.0
    F.leaky_relu(y, 3.0, inplace=True)
    return y


def in_place_residual(x):
    """The shortcut sees what the activation has written over."""
    y = x - 1.0
    out = F.leaky_relu(y, 2.0, inplace=True)
    return y - out * 3.0


def in_place_scaling(x):
    y = x + 0.0
    y *= 3.0
    y -= x
    y /= 2.0
    return y


@pytest.mark.parametrize("function", [in_place_alias, in_place_activation, in_place_residual, in_place_scaling])
def test_operations_in_place_are_followed(function):
    least = attained(lambda x: function(x), [(2,)], 30)
    found = bounds(Net(function), (2,))
    assert found["neuron"] == pytest.approx(least, rel=1e-6)
    assert least <= min(found.values()) * (1 + 1e-9)


@pytest.mark.parametrize(
    "view",
    [lambda y: y.view(1, 1, 4), lambda y: y[:, :2], lambda y: y.detach(), lambda y: y.reshape(1, 2, 2), lambda y: y.T],
)
def test_views_of_what_was_written_over_are_refused(view):
    def through_a_view(x):
        y = x * 1.0
        z = view(y)
        z += 1.0 * z
        return y

    def of_the_base(x):
        y = x * 1.0
        z = view(y)
        y += 1.0 * y
        return z

    for function in (through_a_view, of_the_base):
        with pytest.raises(NotCertifiable):
            system_of(Net(function), (4,))


def test_a_copy_is_no_view():
    def forward(x):
        y = x * 1.0
        z = y.clone()
        y += y
        return z + y

    assert bounds(Net(forward), (2,))["product"] == pytest.approx(3.0)


# -- arithmetic ----------------------------------------------------------------------------------------------------

ARITHMETIC = {
    "rsub cancels": (lambda x: x - torch.rsub(x, 1.0), 2.0),
    "rsub of two": (lambda x: torch.rsub(x, 3.0 * x) + x, 3.0),
    "rsub with alpha": (lambda x: torch.rsub(x, 3.0 * x, alpha=2) + 0.0, 1.0),
    "number minus": (lambda x: x + (1.0 - x) * 0.5, 0.5),
    "tensor minus": (lambda x: x + 3.0 * (torch.ones(1, 2, **double) - x), 2.0),
    "sub with alpha": (lambda x: torch.sub(x, x, alpha=3), 2.0),
    "sub of a constant with alpha": (lambda x: torch.sub(torch.ones(2, **double), x, alpha=3), 3.0),
    "add with alpha": (lambda x: torch.add(torch.ones(2, **double), x, alpha=-3), 3.0),
    "negative": (lambda x: -x - x, 2.0),
    "numpy number": (lambda x: np.float64(2.0) * x, 2.0),
    "numpy number on the right": (lambda x: x / np.float32(0.5), 2.0),
    "integer": (lambda x: 2 * x, 2.0),
    "scalar tensor": (lambda x: torch.tensor(-2.0) * x, 2.0),
    "integer tensor": (lambda x: torch.tensor(3) * x, 3.0),
    "divided by entries": (lambda x: x / torch.tensor([0.5, 4.0], **double), 2.0),
    "bool": (lambda x: x * True, 1.0),
    "matmul": (lambda x: x @ torch.tensor([[1.0, 1.0], [0.0, 0.0]], **double), 2**0.5),
    "roll": (lambda x: x - x.roll(1, 1), 2.0),
    "flip": (lambda x: x + x.flip(1), 2.0),
    "pad": (
        lambda x: F.pad(x[:, None], (2, 1), mode="replicate").flatten(1) if False else F.pad(x, (1, 1), value=7.0),
        1.0,
    ),
    "index": (lambda x: x[:, [0, 0, 1]], 2**0.5),
    "expand": (lambda x: x[:, :1].expand(1, 9), 3.0),
    "constant in cat": (lambda x: torch.cat([torch.ones(1, 3, **double), x], 1), 1.0),
    "cat twice": (lambda x: torch.cat([x, 2.0 * x, x], 1), 6**0.5),
    "absolute value": (lambda x: 2.0 * abs(x), 2.0),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    function, gain = ARITHMETIC[name]
    found = bounds(Net(function), (2,))
    assert attained(function, [(2,)], 5) == pytest.approx(gain, rel=1e-9)
    for bound in found.values():
        assert bound == pytest.approx(gain, rel=1e-6)
        assert bound >= gain * (1 - 1e-15)


# -- coordinates ---------------------------------------------------------------------------------------------------


def sampling_then(step):
    """Frequencies are no pixels: a convolution of sampled data does not share blocks with one of the image."""
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    S = FourierSampling(mask)
    kernel = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(1), **double)
    K = Convolution(kernel, (1, 4, 4))
    return Net(lambda x: step(S, K, x), S, K)


COORDINATES = {
    "convolution of samples": lambda S, K, x: K(S(x)),
    "samples plus image": lambda S, K, x: S(x) + K(x),
    "back and forth": lambda S, K, x: S.T(K(S(x))),
    "image and samples of it": lambda S, K, x: S(K(x)) + x,
}


@pytest.mark.parametrize("name", COORDINATES)
def test_coordinates_that_do_not_meet_are_never_mixed(name):
    net = sampling_then(COORDINATES[name])
    system = system_of(net, {"data": (1, 4, 4)}, is_complex=True)
    with pytest.raises(NotDiagonal):
        blocks_of(system, FourierBasis((4, 4), full=True))
    true = exact_linear(net)
    assert all_bounds(system)["product"] == pytest.approx(true, rel=1e-9)


def exact_linear(net) -> float:
    eye = torch.eye(16, dtype=torch.complex128).reshape(16, 1, 4, 4)
    return float(torch.linalg.matrix_norm(net(eye).reshape(16, -1), 2))


def test_coordinates_that_meet_share_blocks():
    net = sampling_then(lambda S, K, x: x - 0.5 * S.T(S(x)) + K(x))
    system = system_of(net, {"data": (1, 4, 4)}, is_complex=True)
    found = all_bounds(system, FourierBasis((4, 4), full=True))
    assert found["product"] == pytest.approx(exact_linear(net), rel=1e-9)


def test_half_of_the_frequencies_do_not_describe_complex_data():
    net = sampling_then(lambda S, K, x: S.T(S(x)) + K(x))
    with pytest.raises(NotCertifiable, match="complex"):
        system_of(net, (1, 4, 4))
    cert = certify(net, shape=(1, 4, 4))
    assert cert.is_complex
    assert cert.upper >= exact_linear(net) * (1 - 1e-12)


# -- shapes --------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError):
        certify(nn.Linear(3, 3), shape=(4,))
    with pytest.raises(ShapeError, match="shape="):
        certify(nn.Linear(3, 3))
    net = unroll(ForwardBackward(Dense(EYE), L1(0.1)), 2, learn=())
    with pytest.raises(ValueError, match="inputs are"):
        certify(net, wrt="image")
    with pytest.raises(ValueError, match="unknown method"):
        certify(net, method="magic")  # type: ignore[arg-type]
    with pytest.raises(NotCertifiable):
        certify(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), shape=(3,), method="virtual")


def test_priors_of_real_data_meet_no_complex_data():
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    net = unroll(ForwardBackward(FourierSampling(mask), NonNegative()), 1, learn=())
    with pytest.raises(FirmlyError):
        certify(net)
