"""The LISTA family: sparse coding networks whose layers are learned iterations of ISTA and FISTA."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from firmly.errors import SettingsError
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.networks import lista_variants as variants
from firmly.networks.hyper_lista import hyper
from firmly.networks.lista_variants import Problem, require_matrix
from firmly.networks.sparse_network import SparseNetwork
from firmly.networks.support_selection import Selection

Variant = Literal[
    "step", "lista", "lista-tied", "ss", "fista", "cp", "cpss", "coupled", "hessian", "facnet", "ti", "alista", "hyper"
]
SELECTING = ("ss", "cpss", "ti", "alista")
ANALYTIC = ("alista", "hyper")
MATRICES = ("lista", "lista-tied", "ss", "fista", "hessian", "facnet", "hyper")
PUBLISHED = Selection()


def lista(
    D: Tensor | LinearMap,
    depth: int,
    variant: Variant = "alista",
    weight: float = 0.4,
    selection: Selection | None = PUBLISHED,
    whitening: Tensor | LinearMap | None = None,
    certified: bool = False,
) -> SparseNetwork:
    """A network of `depth` layers z <- R(z + g W*(y - D z)) from z = 0, for sparse codes z of data y = D z.

    D is the dictionary: a matrix (m, n), or a map from codes to data (`Dense`, a `Convolution`, the adjoint of one).
    With L = |D|^2 and R the soft threshold by theta, the untrained network is `depth` steps of ISTA (g W = D / L, theta
    = weight / L) for min 1/2 |D z - y|^2 + weight |z|_1, unless said otherwise. What is learned, in every layer:

    - "step" (SLISTA): g alone, with W = D and theta = weight g; made by `unroll(ForwardBackward(...))`.
    - "cp": W and theta; "coupled": W and a theta for every atom; "hessian": the same with W = D H, H symmetric.
    - "ti" (TiLISTA): g and theta, and one W for all layers; "alista": g and theta, with W = `analytic_weights(D)`.
    - "lista": theta and the matrix G in R(G z + E y), with one E for all layers; "lista-tied": with one G, too.
    - "fista" (L-FISTA): theta and the matrices of R(G z + P z_previous + E y), which start as FISTA.
    - "facnet": an orthogonal basis and a step for every entry of the code in it (`RotatedLayer`).
    - "hyper" (HyperLISTA): three numbers for the whole network (`HyperLayer`).

    "ss" and "cpss" are "lista" and "cp" with the support selection that "ti" and "alista" have as well: `selection` is
    its rule, and None leaves it out. With it, and with analytic weights, the untrained network is not ISTA.
    `whitening`, for "alista" and "hyper", stands for other analytic weights: `analytic_whitening(D, regularisation,
    symmetric)`; circular convolutions have one, too, whose weights are as large as the grid. Steps and thresholds stay
    positive whatever the optimiser does; with `certified`, for "step" and "alista", every step stays in the interval
    where its layer is nonexpansive (docs/lista).

    Convolutional dictionaries have the variants step, cp, cpss, coupled, ti and alista. Raises `SettingsError` for what
    does not fit together, `DataError` for atoms that are zero or not finite.
    """
    D = Dense(D) if isinstance(D, Tensor) else D
    if variant not in get_args(Variant):
        raise SettingsError(f"unknown variant {variant!r}: choose one of {', '.join(get_args(Variant))}")
    if variant in MATRICES:
        require_matrix(D, variant)
    if D.is_complex:
        raise SettingsError("the LISTA family is real: write a complex dictionary as a real one of twice the size")
    if depth < 1 or not 0 < weight < float("inf"):
        raise SettingsError(f"depth is at least 1 and the weight positive and finite, given {depth} and {weight}")
    if variant not in SELECTING and selection not in (PUBLISHED, None):
        raise SettingsError(f"{variant!r} has no support selection to set: it is for {', '.join(SELECTING)}")
    if whitening is not None and variant not in ANALYTIC:
        raise SettingsError(f"{variant!r} has no analytic weights: whitening is for {', '.join(ANALYTIC)}")
    if certified and variant not in ("step", "alista"):
        raise SettingsError(f"no interval of certified steps is known for {variant!r}: it is for step and alista")
    problem = Problem(D, depth, weight, selection if variant in SELECTING else None)
    if not problem.lipschitz > 0:
        raise SettingsError("the dictionary has norm zero: no step size fits it")
    layers, common = parts(problem, variant, whitening, certified)
    shared = nn.Module()
    for name, module in {"D": D, **common}.items():
        shared.add_module(name, module)
    return SparseNetwork(layers, shared, variant)


def parts(problem: Problem, variant: Variant, whitening: Tensor | LinearMap | None, certified: bool) -> variants.Parts:
    match variant:
        case "step":
            return variants.step(problem, certified)
        case "cp" | "cpss" | "coupled":
            return variants.coupled(problem, each_atom=variant == "coupled")
        case "hessian":
            return variants.hessian(problem)
        case "ti":
            return variants.tied_weights(problem)
        case "alista":
            return variants.analytic(problem, whitening, certified)
        case "lista" | "lista-tied" | "ss":
            return variants.operators(problem, tied=variant == "lista-tied")
        case "fista":
            return variants.accelerated(problem)
        case "facnet":
            return variants.rotated(problem)
        case "hyper":
            return hyper(problem, whitening)
