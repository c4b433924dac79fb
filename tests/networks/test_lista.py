"""The LISTA family: equal to ISTA and FISTA before training, positive whatever happens, certified or refused."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import firmly as fm
from firmly.algorithms.algorithm import number
from firmly.errors import DataError, NotCertifiable, SettingsError, ShapeError
from firmly.linear import Convolution, Dense, Gradient
from firmly.networks import Selection, SparseNetwork, lista
from firmly.networks.lista import SELECTING, Variant

M, N, DEPTH, WEIGHT = 6, 10, 7, 0.3
VARIANTS = get_args(Variant)
UNTRAINED_ISTA = ("step", "lista", "lista-tied", "cp", "coupled", "hessian", "facnet")
CONVOLUTIONAL = ("step", "cp", "cpss", "coupled", "ti", "alista")


def dictionary(m: int = M, n: int = N, seed: int = 0) -> torch.Tensor:
    D = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return D / D.norm(dim=0)


def data(batch: int = 5, m: int = M) -> torch.Tensor:
    return torch.randn(batch, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def soft(u, theta):
    return u.sign() * (u.abs() - theta).clamp(min=0)


def ista(D, y, depth, weight=WEIGHT):
    """Plain ISTA with the norm from the singular values, on row vectors."""
    step = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    z, codes = torch.zeros(len(y), D.shape[1], dtype=D.dtype), []
    for _ in range(depth):
        z = soft(z - step * (z @ D.T - y) @ D, weight * step)
        codes.append(z)
    return codes


def fista(D, y, depth, weight=WEIGHT):
    """Beck and Teboulle 2009, with t_1 = 1."""
    step = 1 / torch.linalg.matrix_norm(D, 2) ** 2
    z = v = torch.zeros(len(y), D.shape[1], dtype=D.dtype)
    t, codes = 1.0, []
    for _ in range(depth):
        before, z = z, soft(v - step * (v @ D.T - y) @ D, weight * step)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        v = z + (last - 1) / t * (z - before)
        codes.append(z)
    return codes


# -- before training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", UNTRAINED_ISTA)
def test_untrained_networks_are_ista(variant):
    D, y = dictionary(), data()
    net = lista(D, DEPTH, variant, weight=WEIGHT)
    for code, expected in zip(net.codes(y), ista(D, y, DEPTH), strict=True):
        torch.testing.assert_close(code, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["ss", "cpss", "ti"])
def test_without_selection_the_selecting_variants_are_ista_as_well(variant):
    D, y = dictionary(), data()
    net = lista(D, DEPTH, variant, weight=WEIGHT, selection=None)
    torch.testing.assert_close(net(y), ista(D, y, DEPTH)[-1], atol=1e-10, rtol=0)


def test_an_untrained_lfista_is_fista():
    D, y = dictionary(), data()
    for code, expected in zip(lista(D, 12, "fista", WEIGHT).codes(y), fista(D, y, 12), strict=True):
        torch.testing.assert_close(code, expected, atol=1e-10, rtol=0)


def test_step_is_unrolled_forward_backward():
    D, y = dictionary(), data()
    algorithm = fm.algorithms.ForwardBackward(Dense(D), fm.prox.L1(WEIGHT))
    plain = fm.unroll(algorithm, DEPTH, learn=())
    net = lista(D, DEPTH, "step", WEIGHT)
    torch.testing.assert_close(net(y), plain(y, torch.zeros(5, N, dtype=D.dtype)), atol=1e-10, rtol=0)


def test_hyper_is_its_formula_sample_by_sample():
    D, y = dictionary(), data()
    net = lista(D, DEPTH, "hyper")
    with torch.no_grad():
        net.shared.constants.c = torch.tensor([0.02, 0.01, 2.0], dtype=torch.float64)
    W, inverse = fm.networks.analytic_weights(D), torch.linalg.pinv(D)
    for sample, code in zip(y, net(y)):
        z = last = torch.zeros(N, dtype=D.dtype)
        for _ in range(DEPTH):
            r = sample - D @ z
            e = (inverse @ r).abs().sum()
            q = min(max(2.0 * math.log((inverse @ sample).abs().sum() / e), 0), N)
            u = z + W.T @ r + 0.01 * (z != 0).sum().item() * (z - last)
            kept = [i for i in u.abs().argsort(descending=True)[: round(q)] if u[i].abs() > 0.02 * e]
            last, z = z, soft(u, 0.02 * e)
            for i in kept:
                z[i] = u[i]
        torch.testing.assert_close(code, z, atol=1e-10, rtol=0)
    assert torch.equal(net(torch.zeros(1, M, dtype=D.dtype)), torch.zeros(1, N, dtype=D.dtype))


# -- every variant -------------------------------------------------------------------------------------------------


PARAMETERS = {
    "step": DEPTH,
    "lista": N * M + DEPTH * (N * N + 1),
    "lista-tied": N * M + N * N + DEPTH,
    "ss": N * M + DEPTH * (N * N + 1),
    "fista": DEPTH * (N * M + 2 * N * N + 1),
    "cp": DEPTH * (N * M + 1),
    "cpss": DEPTH * (N * M + 1),
    "coupled": DEPTH * (N * M + N),
    "hessian": DEPTH * (N * N + N),
    "facnet": DEPTH * (N * N + N),
    "ti": N * M + 2 * DEPTH,
    "alista": 2 * DEPTH,
    "hyper": 3,
}


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariant:
    def test_codes_end_with_the_output_and_every_parameter_learns(self, variant):
        net, y = lista(dictionary(), DEPTH, variant, WEIGHT), data()
        codes = net.codes(y)
        assert len(codes) == DEPTH and torch.equal(codes[-1], net(y)) and net(y).shape == (5, N)
        assert sum(p.numel() for p in net.parameters()) == PARAMETERS[variant]
        sum(code.square().sum() for code in codes).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())

    def test_samples_do_not_see_each_other(self, variant):
        net, y = lista(dictionary(), DEPTH, variant, WEIGHT), data()
        torch.testing.assert_close(net(y)[2:3], net(y[2:3]), atol=1e-14, rtol=0)

    def test_it_goes_on_from_a_start(self, variant):
        net, y = lista(dictionary(), DEPTH, variant, WEIGHT), data()
        start = torch.randn(5, N, dtype=torch.float64)
        assert not torch.equal(net(y, start), net(y))
        assert torch.equal(net.codes(y, start)[-1], net(y, start))
        assert torch.equal(net(y, torch.zeros_like(start)), net(y))

    def test_gradients(self, variant):
        D = dictionary(3, 5)
        net = lista(D, 2, variant, 0.1, **({"selection": Selection(0.2, 0.4, 1.0)} if variant in SELECTING else {}))
        parameters = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        y = data(2, 3)

        def codes(*values):
            return torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), (y,))

        assert torch.autograd.gradcheck(codes, tuple(parameters.values()), atol=1e-6)

    def test_weights_are_stored_once_and_round_trip(self, variant, tmp_path):
        net, y = lista(dictionary(), DEPTH, variant, WEIGHT), data()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        tensors = {name: t.contiguous() for name, t in net.state_dict().items()}
        assert len({t.data_ptr() for t in net.state_dict().values()}) == len(tensors)
        save_file(tensors, tmp_path / "weights.safetensors")
        fresh = lista(dictionary(seed=3), DEPTH, variant, WEIGHT)
        fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(fresh(y), net(y))

    def test_copies_are_independent(self, variant):
        net, y = lista(dictionary(), DEPTH, variant, WEIGHT), data()
        copied, before = copy.deepcopy(net), net(y).detach()
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.1)
        assert torch.equal(net(y), before) and not torch.equal(copied(y), before)

    @pytest.mark.parametrize("raw", [-30.0, 30.0])
    def test_steps_and_thresholds_stay_positive(self, variant, raw):
        net = lista(dictionary(), 2, variant, WEIGHT)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if parameter.dim() < 2 and ("step_size" in name or "prior" in name or "curvature" in name):
                    parameter.fill_(raw)
        for layer in net.layers:
            scalars = [getattr(layer, n) for n in ("step_size", "curvature") if hasattr(layer, n)]
            scalars += [layer.prior.weight] if hasattr(layer, "prior") else []
            assert all(bool((torch.as_tensor(s) > 0).all()) for s in scalars)

    def test_single_precision_follows_double(self, variant):
        D, y = dictionary(), data()
        net, double = lista(D.float(), 4, variant, WEIGHT), lista(D, 4, variant, WEIGHT)
        code = net(y.float())
        assert code.dtype == torch.float32
        torch.testing.assert_close(code.double(), double(y), atol=1e-4, rtol=1e-4)
        assert net.double()(y).dtype == torch.float64

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_it_runs_on_cuda(self, variant):
        D, y = dictionary(), data()
        on_device = lista(D.cuda(), DEPTH, variant, WEIGHT)(y.cuda())
        torch.testing.assert_close(on_device.cpu(), lista(D, DEPTH, variant, WEIGHT)(y), atol=1e-10, rtol=0)

    def test_misfit_data_are_refused(self, variant):
        net = lista(dictionary(), 2, variant, WEIGHT)
        with pytest.raises(ShapeError, match="takes"):
            net(data(5, M + 1))


# -- certificates --------------------------------------------------------------------------------------------------


def perturbed(net: SparseNetwork) -> SparseNetwork:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "hyper"])
def test_trained_networks_are_certified(variant, tmp_path):
    rule = {"selection": Selection(0.1, 0.2, 2.0)} if variant in SELECTING else {}
    net = perturbed(lista(dictionary(4, 6), 3, variant, WEIGHT, **rule))
    certificate = fm.certify(net, budget_s=2)
    assert 0 < certificate.lower <= certificate.upper < math.inf
    certificate.save(tmp_path / "net.certificate")
    fm.verify(tmp_path / "net.certificate", net)
    y, generator = data(200, 4), torch.Generator().manual_seed(7)
    for size in (1e-3, 1.0):
        moved = y + size * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        ratio = (net(moved) - net(y)).norm(dim=1) / (moved - y).norm(dim=1)
        assert ratio.max().item() <= certificate.upper


@pytest.mark.parametrize("variant", SELECTING)
def test_published_support_selection_is_refused_with_the_reason(variant):
    with pytest.raises(NotCertifiable, match=r"discontinuous.*no Lipschitz constant exists"):
        fm.certify(lista(dictionary(), 3, variant))


def test_hyper_is_refused_with_the_reason():
    with pytest.raises(NotCertifiable, match="from the data"):
        fm.certify(lista(dictionary(), 3, "hyper"))


@pytest.mark.parametrize("variant", ["step", "alista"])
@pytest.mark.parametrize("raw", [-30.0, 30.0, 0.3])
def test_certified_steps_cannot_leave_their_interval(variant, raw):
    net = lista(dictionary(4, 16), 3, variant, WEIGHT, certified=True)
    assert all(c.holds for conditions in net.conditions() for c in conditions)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "step_size" in name:
                parameter.fill_(raw)
    for layer in net.layers:
        assert 0 < number(layer.step_size) < number(layer.rule("step_size").high)


def test_steps_are_assigned_in_any_precision():
    net = lista(dictionary().float(), 2, "alista", WEIGHT)
    for network in (net, copy.deepcopy(net).double()):
        for dtype in (torch.float32, torch.float64):
            with torch.no_grad():
                network.layers[0].step_size = torch.tensor(0.3, dtype=dtype)
            assert number(network.layers[0].step_size) == pytest.approx(0.3, rel=1e-6)
    assert net(data().float()).dtype == torch.float32


def test_projection_brings_steps_back():
    for variant in ("step", "alista"):
        net = lista(dictionary(), 3, variant, WEIGHT)
        limit = float(net.layers[0].rule("step_size").high)
        with torch.no_grad():
            for layer, factor in zip(net.layers, (0.5, 1.05, 3.0)):
                layer.step_size = torch.tensor(factor * limit, dtype=torch.float64)
        broken = [not all(c.holds for c in conditions if c.name == "step_size") for conditions in net.conditions()]
        assert broken == [False, True, True] and net.project() == [1, 2] and net.project() == []
        steps = [number(layer.step_size) / limit for layer in net.layers]
        assert steps == pytest.approx([0.5, 1 - 1e-6, 1 - 1e-6], abs=1e-9)


# -- convolutional dictionaries ------------------------------------------------------------------------------------


def filters(j: int, channels: int = 1, size: int = 3) -> torch.Tensor:
    kernel = torch.randn(j, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return kernel / kernel.flatten(1).norm(dim=1)[:, None, None, None]


def convolutional(padding="circular", channels: int = 1):
    """Codes (4, 6, 5) to images, as the adjoint of a convolution and as a convolution."""
    kernel = filters(4, channels)
    return [
        Convolution(kernel, (channels, 6, 5), padding).T,
        Convolution(kernel.transpose(0, 1), (4, 6, 5), padding),
    ]


@pytest.mark.parametrize("padding", ["circular", "zero"])
@pytest.mark.parametrize("variant", CONVOLUTIONAL)
def test_convolutional_networks(variant, padding):
    for D in convolutional(padding):
        y = torch.randn(3, 1, 6, 5, dtype=torch.float64)
        net = lista(D, 4, variant, WEIGHT, **({"selection": None} if variant in SELECTING else {}))
        matrix = D.matrix()
        expected = ista(matrix, y.flatten(1), 4)[-1].reshape(3, 4, 6, 5)
        assert net.codes(y)[-1].shape == (3, 4, 6, 5)
        if variant != "alista":
            torch.testing.assert_close(net(y), expected, atol=1e-10, rtol=0)
        net(y).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        rule = {"selection": Selection(0.1, 0.2)} if variant in SELECTING else {}
        assert lista(D, 2, variant, WEIGHT, **rule)(y).isfinite().all()


def test_convolutional_networks_are_certified_in_fourier():
    D = Convolution(filters(2), (1, 8, 8)).T
    for variant in ("step", "cp", "alista"):
        rule = {"selection": None} if variant == "alista" else {}
        certificate = fm.certify(perturbed(lista(D, 2, variant, WEIGHT, **rule)), budget_s=3)
        assert certificate.lower <= certificate.upper < math.inf and certificate.basis.name == "fourier"


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variant": "lsta"}, "unknown variant"),
        ({"depth": 0}, "depth is at least 1"),
        ({"weight": 0.0}, "weight positive"),
        ({"weight": float("nan")}, "weight positive"),
        ({"variant": "cp", "selection": Selection(0.1)}, "no support selection"),
        ({"variant": "cp", "whitening": torch.eye(M)}, "no analytic weights"),
        ({"variant": "cp", "certified": True}, "no interval of certified steps"),
        ({"D": torch.zeros(M, N), "variant": "step"}, "norm zero"),
        ({"D": torch.ones(M, N, dtype=torch.complex64)}, "is real"),
    ],
)
def test_misfit_settings_are_refused(change, text):
    with pytest.raises(SettingsError, match=text):
        lista(**{"D": dictionary(), "depth": 2, "variant": "alista", **change})


def test_misfit_dictionaries_are_refused():
    for variant in set(VARIANTS) - set(CONVOLUTIONAL):
        with pytest.raises(SettingsError, match="a matrix"):
            lista(convolutional()[0], 2, variant)
    with pytest.raises(SettingsError, match="bounded support"):
        lista(convolutional()[0], 2, "alista", certified=True)
    with pytest.raises(ShapeError):
        lista(dictionary(), 2, "alista", whitening=torch.eye(3, dtype=torch.float64))
    with pytest.raises(SettingsError, match="a dictionary is"):
        lista(Gradient((1, 4, 4)), 2, "cp")
    with pytest.raises(ShapeError):
        lista(torch.randn(3), 2, "cp")
    zero = dictionary()
    zero[:, 2] = 0
    with pytest.raises(DataError, match="not zero"):
        lista(zero, 2, "alista")
    with pytest.raises(SettingsError, match="growth"):
        Selection(growth=2.0)


@pytest.mark.parametrize("variant", ["cp", "hessian", "ti", "alista"])
def test_the_traced_form_of_a_layer_is_the_layer(variant):
    net = perturbed(lista(dictionary(), 2, variant, WEIGHT, **({"selection": None} if variant in SELECTING else {})))
    z, y = torch.randn(5, N, dtype=torch.float64), data()
    for layer in net.layers:
        code, observed = layer.linear_part()
        expected = layer.step(layer.start(y, z), y, 0).x
        torch.testing.assert_close(layer.prior.prox(code(z) + observed(y)), expected, atol=1e-13, rtol=0)
