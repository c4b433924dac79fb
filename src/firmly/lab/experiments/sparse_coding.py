"""Should one learn the inverse, the step sizes or the threshold? Networks of the LISTA family, side by side."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firmly.certificates import attack, certify
from firmly.errors import FirmlyError, NotCertifiable
from firmly.lab.charts import Line, at_least, at_most
from firmly.lab.experiments.sparse_problems import AllCodes, dictionary, draw, noisy, optimise_fully
from firmly.lab.page import Chart, Page, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.training import Plan, train
from firmly.networks import Selection, calibrate, calibrate_hyper, in_metric, lista, nmse_db
from firmly.networks.code_report import lasso_loss, layer_reports, log_error
from firmly.networks.lista import Variant
from firmly.networks.sparse_network import SparseNetwork
from firmly.priors import lasso


@dataclass(frozen=True)
class SparseCodingSettings:
    """Codes of length `atoms` with a share `density` of non-zeros, seen through a Gaussian `rows` x `atoms` dictionary.

    `depth` layers; `codes` are drawn for calibration and as many for the test; `fine_steps` fine-tune the calibrated
    network end to end, in `epochs` parts. `snr` is the signal-to-noise ratio of the noisy case, dB. `ramps` are those
    of the continuous selections. The step sizes are learned on a `step_rows` x `step_atoms` problem with `step_weight`
    times the largest useful weight, and the variants are compared on a `small_rows` x `small_atoms` one, each trained
    for `small_steps` steps.
    """

    rows: int = 250
    atoms: int = 500
    density: float = 0.1
    depth: int = 16
    codes: int = 1000
    fine_steps: int = 120
    epochs: int = 4
    batch: int = 256
    learning_rate: float = 1e-2
    snr: float = 40.0
    ramps: tuple[float, ...] = (1.0,)
    step_rows: int = 64
    step_atoms: int = 256
    step_weight: float = 0.8
    step_depth: int = 10
    step_codes: int = 400
    small_rows: int = 40
    small_atoms: int = 80
    small_depth: int = 8
    small_steps: int = 1500
    variants: tuple[str, ...] = ("step", "alista", "cp", "lista")
    certify_seconds: float = 8.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "atoms", "depth", "codes", "fine_steps", "epochs", "batch", "step_depth", "small_depth"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(self.rows < self.atoms, f"rows < atoms; given {self.rows} and {self.atoms}")
        require(0 < self.density < 1, f"density lies between 0 and 1; given {self.density}")
        require(0 < self.step_weight < 1, f"step_weight lies between 0 and 1; given {self.step_weight}")
        require(all(r > 0 for r in self.ramps), f"ramps are positive; given {self.ramps}")


# -- the ladder ----------------------------------------------------------------------------------------------------


def ladder(
    settings: SparseCodingSettings, run: RunFolder, listen: Listener
) -> tuple[Section, dict[str, list[float]], SparseNetwork]:  # fmt: skip
    """Errors per layer from ISTA to fine-tuned support selection, and the network with the continuous one."""
    D = dictionary(settings.rows, settings.atoms, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    codes = draw(settings.codes, settings.atoms, settings.density, generator)
    truth = draw(settings.codes, settings.atoms, settings.density, generator)
    y, y_test = codes @ D.mT, truth @ D.mT
    curves: dict[str, list[float]] = {}
    rows: list[tuple[Any, ...]] = []

    def tell(name: str, what: str, net: SparseNetwork, began: float, data: Tensor = y_test) -> None:
        with torch.no_grad():
            curves[name] = [nmse_db(code, truth) for code in net.codes(data)]
        learned = None if what == "nothing" else sum(p.numel() for p in net.parameters())
        rows.append((name, what, learned, curves[name][-1], time.perf_counter() - began))

    jobs = 5 + len(settings.ramps)

    def working(done: int) -> None:
        listen("work", {"name": "the ladder", "done": done, "total": jobs})

    for name, variant in (("ISTA", "step"), ("FISTA", "fista")):
        began = time.perf_counter()
        tell(name, "nothing", lista(D, settings.depth, variant, weight=0.1), began)  # type: ignore[arg-type]
    working(1)
    calibrated: dict[str, SparseNetwork] = {}
    options: list[tuple[str, dict[str, Any]]] = [
        ("analytic weights", {"selection": None}),
        ("analytic weights, selection", {}),
        *((f"continuous selection, ramp {ramp:g}", {"selection": Selection(ramp=ramp)}) for ramp in settings.ramps),
    ]
    for k, (name, chosen) in enumerate(options):
        began = time.perf_counter()
        calibrated[name] = lista(D, settings.depth, "alista", **chosen)
        calibrate(calibrated[name], y, codes)
        tell(name, "step, threshold: by trying", calibrated[name], began)
        working(2 + k)
    began = time.perf_counter()
    hyper = lista(D, settings.depth, "hyper")
    calibrate_hyper(hyper, y[:200], codes[:200])
    tell("three numbers (HyperLISTA)", "three numbers: by trying", hyper, began)
    working(jobs - 1)
    began = time.perf_counter()
    fine = fine_tuned(settings, D, calibrated["analytic weights, selection"], run, listen)
    tell("selection, fine-tuned", "step, threshold: end to end", fine, began)
    began = time.perf_counter()
    rough = lista(D, settings.depth, "alista")
    calibrate(rough, noisy(y, settings.snr, generator), codes)
    tell(f"selection, {settings.snr:g} dB noise", "by trying", rough, began, noisy(y_test, settings.snr, generator))
    working(jobs)
    lines = [
        Line(name, list(enumerate(values, 1)), _role(name)) for name, values in curves.items() if "noise" not in name
    ]
    text = (
        f"Codes of length {settings.atoms} with {settings.density:.0%} non-zeros, {settings.rows} measurements, "
        f"{settings.depth} layers; the error is that of {settings.codes} codes that no method has seen. ALISTA "
        f"learns two numbers for "
        "every layer. Here they are found by trying, one layer after the other, without any gradient; HyperLISTA has "
        "three numbers in "
        "all. Support selection makes most of the difference."
    )
    table = Table(("network", "what is learned", "numbers learned", "NMSE, dB", "seconds"), rows, ours=[5, 6])
    chart = Chart(lines, "layer", "NMSE, dB", "Test error after every layer.")
    return Section("The ladder", text, (table, chart)), curves, calibrated[options[2][0]]


def _role(name: str) -> str:
    return {"selection, fine-tuned": "ours", "ISTA": "data"}.get(name, "other")


def fine_tuned(
    settings: SparseCodingSettings, D: Tensor, start: SparseNetwork, run: RunFolder, listen: Listener
) -> SparseNetwork:  # fmt: skip
    """A copy of the calibrated network, trained end to end on the log error of its last layers."""
    net = lista(D.float(), settings.depth, "alista")
    net.load_state_dict(start.state_dict())
    steps = math.ceil(settings.fine_steps / settings.epochs)
    plan = Plan(epochs=settings.epochs, steps=steps, learning_rate=settings.learning_rate, seed=settings.seed)
    half = max(settings.depth // 2, 1)
    D32 = D.float()

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        codes = draw(settings.batch, settings.atoms, settings.density, generator).float()
        return codes @ D32.mT, codes

    outcome = train(
        AllCodes(net), sample, plan, run, "fine-tuned", loss=lambda codes, truth: log_error(codes, truth, half),
        callback=lambda e: listen("training", {"name": "end to end", "total": plan.epochs * plan.steps, **e}),
    )  # fmt: skip
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return net.double()


# -- step sizes ----------------------------------------------------------------------------------------------------


def learned_steps(settings: SparseCodingSettings, listen: Listener) -> tuple[Section, float]:
    """SLISTA: step sizes learned on the objective itself, against ISTA and FISTA; the gain at the last layer."""
    generator = torch.Generator().manual_seed(settings.seed + 42)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    D = gaussian(settings.step_rows, settings.step_atoms)
    D = D / D.norm(dim=0)

    def data() -> Tensor:
        y = gaussian(settings.step_codes, settings.step_atoms) @ D.mT
        return y / (y @ D).abs().amax(1, keepdim=True)

    y, y_test, weight = data(), data(), settings.step_weight
    best = lasso(D, y_test, weight, tol=0.0, absolute_tol=1e-13).objective
    lines, rows = [], []
    depths = sorted({max(1, settings.step_depth // 5), max(1, settings.step_depth // 2), settings.step_depth})
    found: dict[str, list[float]] = {}
    for name, variant in (("ISTA", "step"), ("FISTA", "fista")):
        net = lista(D, settings.step_depth, variant, weight=weight)  # type: ignore[arg-type]
        found[name] = [_suboptimality(net.shared.D, y_test, code, weight, best) for code in net.codes(y_test)]
    found["SLISTA"] = []
    for index, depth in enumerate(depths):
        net = lista(D, depth, "step", weight=weight)
        optimise_fully(net, lambda net=net: lasso_loss(net.shared.D, y, net(y), weight))
        found["SLISTA"].append(_suboptimality(net.shared.D, y_test, net(y_test), weight, best))
        listen("work", {"name": "learning step sizes", "done": index + 1, "total": len(depths)})
    for name, values in found.items():
        points = list(zip(depths, values)) if name == "SLISTA" else list(enumerate(values, 1))
        lines.append(Line(name, points, "ours" if name == "SLISTA" else "other"))
    L = net.shared.D.norm().upper ** 2
    taken = [float(layer.step_size.detach()) * L for layer in net.layers]
    for depth in depths:
        rows.append((depth, found["ISTA"][depth - 1], found["FISTA"][depth - 1], found["SLISTA"][depths.index(depth)]))
    gain = found["ISTA"][settings.step_depth - 1] / max(found["SLISTA"][-1], 1e-300)
    text = (
        f"A {settings.step_rows} × {settings.step_atoms} problem with so large a weight ({weight:g} of the largest "
        f"useful one) that "
        "solutions have few non-zeros. One step size for every layer is learned, without codes, on the Lasso "
        "objective of training data. "
        f"The learned steps are {min(taken):.2g} to {max(taken):.2g} times 1/L: beyond 2/L, where no theorem about "
        f"ISTA reaches, and "
        f"{gain:,.0f} times nearer to the minimum after {settings.step_depth} layers. OISTA explains why: on the "
        f"support of the solution the "
        "curvature is smaller than L, and steps may be as long as it allows."
    )
    chart = Chart(lines, "layers", "mean of F − F*", "How far from the minimum of the Lasso, on test data.", log_y=True)
    return Section(
        "Learned step sizes", text, (Table(("layers", "ISTA", "FISTA", "SLISTA"), rows, ours=[2]), chart)
    ), gain


def _suboptimality(D: Any, y: Tensor, code: Tensor, weight: float, best: Tensor) -> float:
    with torch.no_grad():
        return max(float(lasso_loss(D, y, code, weight)) - float(best.mean()), 1e-16)


# -- what is learned, what it costs, what it guarantees ------------------------------------------------------------


def comparison(
    settings: SparseCodingSettings, run: RunFolder, listen: Listener
) -> tuple[Section, list[tuple[Any, ...]]]:
    """The same training for every variant: error, gaps, bounds."""
    D = dictionary(settings.small_rows, settings.small_atoms, settings.seed + 1)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    truth = draw(500, settings.small_atoms, settings.density / 2, generator)
    y_test = truth @ D.mT
    weight = 0.02
    asked: list[tuple[str, str, Variant, dict[str, Any]]] = []
    for variant in settings.variants:
        if variant == "alista":
            asked.append(("ALISTA", "step, threshold", "alista", {"selection": None}))
            asked.append(
                ("ALISTA, certified steps", "step, threshold", "alista", {"selection": None, "certified": True})
            )
            continuous = {"selection": Selection(ramp=settings.ramps[0]), "certified": True}
            asked.append(("ALISTA, continuous selection", "step, threshold", "alista", continuous))
            asked.append(("ALISTA, published selection", "step, threshold", "alista", {}))
        elif variant == "step":
            asked.append(("SLISTA", "step", "step", {}))
            asked.append(("SLISTA, certified steps", "step", "step", {"certified": True}))
        else:
            asked.append((f"{variant.upper()}", "the inverse", variant, {}))  # type: ignore[arg-type]
    rows = []
    for index, (name, what, variant, options) in enumerate(asked):
        began = time.perf_counter()
        net = lista(D.float(), settings.small_depth, variant, weight=weight, **options)

        def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            codes = draw(64, settings.small_atoms, settings.density / 2, generator).float()
            return codes @ D.float().mT, codes

        rate = 3e-2 if variant in ("step", "alista") else 1e-2
        plan = Plan(epochs=1, steps=settings.small_steps, learning_rate=rate, seed=settings.seed)
        outcome = train(
            AllCodes(net), sample, plan, run, name.lower().replace(" ", "-").replace(",", ""),
            loss=lambda codes, truth: log_error(codes, truth, 1),
        )  # fmt: skip
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        seconds = time.perf_counter() - began
        net = net.double()
        last = layer_reports(net, y_test, truth, weight)[-1]
        listen("work", {"name": "training and certifying", "done": index + 1, "total": len(asked)})
        bound, reason = bracket(net, y_test, settings.certify_seconds)
        away = None if last.to_fixed_point is None else last.to_fixed_point
        learned = sum(p.numel() for p in net.parameters())
        rows.append((name, what, learned, seconds, last.nmse, last.support_error, last.gap, away, bound or reason))
    columns = (
        "network",
        "learned",
        "numbers",
        "seconds",
        "NMSE, dB",
        "support error",
        "gap",
        "to fixed point",
        "amplification",
    )
    text = (
        f"Every network has {settings.small_depth} layers, sees the same {settings.small_steps} batches and is "
        f"trained on the codes themselves "
        f"({settings.small_rows} measurements, {settings.small_atoms} atoms). The gap is the duality gap of the "
        f"Lasso with weight {weight:g}. The "
        "distance to the fixed point is to where the last layer goes when it is iterated on (empty: it does not "
        "converge). The last column "
        "brackets how much an error of the data can grow: the lower end is attained, the upper one proved; ALISTA is "
        "certified in its own metric "
        "and converted to Euclidean norms."
    )
    return Section("What to learn, what it costs, what it guarantees", text, (Table(columns, rows),)), rows


def bracket(net: SparseNetwork, y: Tensor, seconds: float) -> tuple[str, str]:
    """The certified bracket of a network as text, or an empty text and the reason why there is none."""
    try:
        if net.variant == "alista":
            view = in_metric(net)
            upper = view.euclidean(certify(view.network, budget_s=seconds).upper)
        else:
            upper = certify(net, budget_s=seconds).upper
    except NotCertifiable as refusal:
        return "", "none: selection is discontinuous" if "discontinuous" in str(refusal) else f"none: {refusal}"
    except FirmlyError as refusal:
        return "", f"none: {refusal}"
    sample = y[[int(y.norm(dim=1).argmax())]]
    found = attack(net.requires_grad_(False), sample, radius=0.05 * float(sample.norm()))
    return f"{at_least(found.ratio)} … {at_most(upper)}", ""


def run_sparse_coding(settings: SparseCodingSettings, run: RunFolder, listen: Listener) -> Page:
    first, curves, _ = ladder(settings, run, listen)
    second, gain = learned_steps(settings, listen)
    third, _ = comparison(settings, run, listen)
    by_trying = curves["analytic weights, selection"][-1]
    fine, hyper = curves["selection, fine-tuned"][-1], curves["three numbers (HyperLISTA)"][-1]
    continuous = curves[f"continuous selection, ramp {settings.ramps[0]:g}"][-1]
    summary = (
        f"After {settings.depth} iterations ISTA has an error of {curves['ISTA'][-1]:.1f} dB and FISTA of "
        f"{curves['FISTA'][-1]:.1f} dB. With analytic "
        f"weights and support selection, two numbers per layer that are found by trying reach {by_trying:.1f} dB, "
        f"three numbers for all layers {hyper:.1f} dB, "
        f"and training end to end {fine:.1f} dB. Published selection jumps, so that nothing can be certified; its "
        f"continuous form reaches "
        f"{continuous:.1f} dB and has a constant."
    )
    facts = {
        "calibrated, dB": f"{by_trying:.1f}",
        "fine-tuned, dB": f"{fine:.1f}",
        "three numbers, dB": f"{hyper:.1f}",
        "learned steps over ISTA": gain,
    }
    return Page("Two numbers per layer are enough, if the weights are right", summary, (first, second, third), facts)


DEFAULT = SparseCodingSettings()
SMOKE = SparseCodingSettings(
    rows=30, atoms=60, depth=4, codes=40, fine_steps=4, epochs=2, batch=16, ramps=(1.0,), step_rows=16, step_atoms=40,
    step_depth=5, step_codes=30, small_rows=12, small_atoms=24, small_depth=3, small_steps=5, certify_seconds=1.0,
)  # fmt: skip
FULL = dataclasses.replace(
    DEFAULT, codes=1000, fine_steps=600, step_codes=1000, step_depth=20, small_steps=10_000, ramps=(0.5, 1.0, 2.0, 8.0),
    variants=("step", "alista", "ti", "cp", "coupled", "hessian", "lista", "lista-tied", "fista", "facnet"),
    certify_seconds=60.0,
)  # fmt: skip
STUDY = Study(
    "sparse-coding", "Sparse coding", {"smoke": SMOKE, "default": DEFAULT, "full": FULL},
    lambda settings: f"sparse codes of length {settings.atoms} from {settings.rows} measurements", run_sparse_coding,
)  # fmt: skip
