"""Which currents explain the field outside the head: linear, sparse and learned inverses of real sensors."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firmly.certificates import Certificate, attack, certify, verify
from firmly.data import meg_sample, vectorview
from firmly.lab.charts import at_least, at_most
from firmly.lab.experiments.meg_pictures import picture_of_sources
from firmly.lab.experiments.meg_problems import (
    TIMES,
    WhereItIs,
    as_mask,
    missed,
    random_sources,
    two_dipoles,
)
from firmly.lab.page import Page, Pictures, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.training import Plan, train
from firmly.linear import Dense
from firmly.networks import analytic_weights
from firmly.priors.sources import (
    GroupLista,
    MinimumNorm,
    SourceModel,
    gamma_map,
    localisation_error,
    mixed_norm,
    reweighted_mixed_norm,
    spatial_dispersion,
    whitener,
)


@dataclass(frozen=True)
class MegSettings:
    """The learned inverse has `depth` layers on `components` cosine coefficients; `threshold` starts its thresholds.

    `windows` are held-out random windows, `alpha` the percentage of the mixed norms, `blur` the distance in metres over
    which the loss forgives, `response` the number of the real recording's condition, (`begin`, `end`) its window.
    """

    depth: int = 8
    components: int = 8
    threshold: float = 10.0
    epochs: int = 6
    steps: int = 50
    batch: int = 16
    learning_rate: float = 0.03
    blur: float = 0.015
    seeds: int = 6
    windows: int = 40
    alpha: float = 40.0
    response: int = 0
    begin: float = 0.06
    end: float = 0.15
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "components", "epochs", "steps", "batch", "seeds", "windows"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(self.components <= TIMES, f"components is at most {TIMES}; given {self.components}")
        require(0 < self.alpha < 100, f"alpha is a percentage; given {self.alpha}")
        require(self.blur > 0 and self.threshold > 0, "blur and threshold are positive")
        require(0 <= self.response < 4, f"there are responses 0 to 3; given {self.response}")
        require(-0.1 <= self.begin < self.end <= 0.4, "the recording has -0.1 .. 0.4 s: begin < end inside it")

    def plan(self) -> Plan:
        names = {f.name for f in dataclasses.fields(Plan)} & {f.name for f in dataclasses.fields(self)}
        return Plan(**{name: getattr(self, name) for name in names})


class Method(NamedTuple):
    """A way to estimate: strengths (sources,) and the number of active sources (None: all) of one window."""

    name: str
    estimate: Callable[[Tensor], tuple[Tensor, int | None]]


def untrained(settings: MegSettings, model: SourceModel) -> GroupLista:
    return GroupLista(model, TIMES, settings.depth, settings.components, threshold=settings.threshold).float().eval()


def trained(
    settings: MegSettings, model: SourceModel, positions: Tensor, run: RunFolder, name: str, listen: Listener
) -> GroupLista:  # fmt: skip
    """The learned inverse, trained on random windows; it goes on from its checkpoint if there is one."""
    torch.manual_seed(settings.seed)
    network = untrained(settings, model)
    whereabouts = WhereItIs(network, model, positions, settings.blur)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y, _, chosen = random_sources(model, settings.batch, generator)
        return y.float(), as_mask(chosen, model.sources)

    total = settings.epochs * settings.steps
    outcome = train(
        whereabouts, sample, settings.plan(), run, name, loss=missed,
        callback=lambda event: listen("training", {"name": name, "total": total, **event}),
    )  # fmt: skip
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return network.eval()


# -- the study -----------------------------------------------------------------------------------------------------


def methods_of(model: SourceModel, network: nn.Module | None, alpha: float) -> list[Method]:
    def linear(inverse: MinimumNorm) -> Callable[[Tensor], tuple[Tensor, int | None]]:
        return lambda y: (model.strength(inverse(y))[0], None)

    found = [
        Method("MNE", linear(MinimumNorm(model))),
        Method("dSPM", linear(MinimumNorm(model, "dspm"))),
        Method("sLORETA", linear(MinimumNorm(model, "sloreta"))),
    ]
    if network is not None:
        found.append(Method("learned group-LISTA", lambda y: _learned(model, network, y)))
    found.append(Method("mixed norm", lambda y: _sparse(mixed_norm(model, y, alpha))))
    found.append(Method("reweighted mixed norm", lambda y: _sparse(reweighted_mixed_norm(model, y, alpha))))
    found.append(Method("gamma-MAP", lambda y: _sparse(gamma_map(model, y, tol=1e-4))))
    return found


def _sparse(estimates: list[Any]) -> tuple[Tensor, int | None]:
    return estimates[0].strength(), len(estimates[0].active)


@torch.no_grad()
def _learned(model: SourceModel, network: nn.Module, y: Tensor) -> tuple[Tensor, int | None]:
    strength = model.strength(network(y.float()).double())[0]
    return strength, int((strength > 0).sum())


def compare(
    methods: list[Method], problems: list[tuple[Tensor, Tensor]], positions: Tensor, what: str, listen: Listener
) -> dict[str, dict[str, Any]]:
    """Errors in mm, dispersion, active sources and milliseconds of every method on (truth, data) problems."""
    found = {}
    for index, method in enumerate(methods):
        listen("work", {"name": f"localising {what}", "done": index + 1, "total": len(methods)})
        errors, spread, active, seconds, nothing = [], [], [], [], 0
        for truth, data in problems:
            began = time.perf_counter()
            strength, count = method.estimate(data)
            seconds.append(time.perf_counter() - began)
            active.append(count)
            if not float(strength.max()) > 0:
                nothing += 1
                continue
            errors.append(1e3 * localisation_error(strength, positions, truth))
            spread.append(1e3 * spatial_dispersion(strength, positions, truth))
        every = torch.cat(errors) if errors else torch.tensor([math.inf])
        found[method.name] = {
            "mean": float(every.mean()),
            "median": float(every.median()),
            "largest": float(every.max()),
            "dispersion": sum(spread) / max(len(spread), 1),
            "active": active,
            "milliseconds": 1e3 * sorted(seconds)[len(seconds) // 2],
            "nothing": nothing,
        }
    return found


def certified(network: GroupLista, run: RunFolder) -> tuple[Certificate, float]:
    """The certificate of the layers, and the bound from whitened data to currents that follows from it."""
    certificate = certify(network.unrolled.double(), wrt="data")
    certificate.save(run / "certificate.safetensors")
    verify(run / "certificate.safetensors", network.unrolled)
    before = Dense(network.balance.double()).norm().upper * Dense(network.cosines.double()).norm().upper
    return certificate, certificate.upper * before * float(network.scale.max()) * (1 + 1e-12)


def run_meg(settings: MegSettings, run: RunFolder, listen: Listener) -> Page:
    leadfield = vectorview()
    model, positions = SourceModel(leadfield.gain), leadfield.positions
    network = trained(settings, model, positions, run, "group-lista", listen)
    methods = methods_of(model, network, settings.alpha)
    start = untrained(settings, model)
    methods.insert(4, Method("the same, untrained", lambda y: _learned(model, start, y)))
    problems = [two_dipoles(model, positions, seed) for seed in range(settings.seeds)]
    dipoles = compare(methods, problems, positions, "two dipoles", listen)
    generator = torch.Generator().manual_seed(settings.seed + 100)
    y, _, truths = random_sources(model, settings.windows, generator)
    random_problems = [(truth, y[[k]]) for k, truth in enumerate(truths)]
    held_out = compare(methods, random_problems, positions, "random windows", listen)

    listen("certify", {"name": "the learned inverse"})
    certificate, bound = certified(network, run)
    data = problems[0][1]
    found = attack(network.double().requires_grad_(False), data, radius=math.sqrt(data.numel()) * 0.1)
    network.float()
    linear = {
        "MNE": MinimumNorm(model).norm(),
        "dSPM": MinimumNorm(model, "dspm").norm(),
        "sLORETA": MinimumNorm(model, "sloreta").norm(),
    }
    bounds = {name: f"{at_least(n.lower)} … {at_most(n.upper)}" for name, n in linear.items()}
    bounds["the same, untrained"] = "not computed"
    bounds["learned group-LISTA"] = f"{at_least(found.ratio)} … {at_most(bound)}"
    rows = [
        (
            m.name, d["mean"], d["median"], d["largest"], d["dispersion"], _counted(d["active"]), d["milliseconds"],
            bounds.get(m.name, "none known"),
        )
        for m in methods
        for d in [dipoles[m.name]]
    ]  # fmt: skip
    others = [
        (m.name, d["mean"], d["median"], d["largest"], d["dispersion"], d["nothing"])
        for m in methods
        for d in [held_out[m.name]]
    ]
    ours = [k for k, m in enumerate(methods) if m.name == "learned group-LISTA"]
    learned, dspm = dipoles["learned group-LISTA"], dipoles["dSPM"]
    columns = ("method", "mean error, mm", "median", "largest", "dispersion, mm", "active", "ms", "amplification")
    found_columns = ("method", "mean error, mm", "median", "largest", "dispersion, mm", "found nothing")
    sections = [
        Section(
            "Two dipoles",
            f"{settings.seeds} problems: two dipoles at least 5 cm apart, seen through 306 real sensors and noise. The "
            "error is the distance from each true dipole to the nearer of the two strongest peaks that are 3 cm apart. "
            "The last column is the worst-case amplification from whitened data to the estimate: exact for the linear "
            "methods (attained and proved), attacked and certified for the learned one. (dSPM and sLORETA are "
            "statistics "
            "without a unit, the others currents in nAm.) The sparse solvers minimise "
            "a functional whose solution jumps when a source appears, and no finite bound is known for them.",
            (Table(columns, rows, ours=ours),),
        ),
        Section(
            "Random windows",
            f"{settings.windows} held-out windows with one to three dipoles of random strength (9 to 30 nAm) and "
            f"course.",
            (Table(found_columns, others, ours=ours),),
        ),
        Section(
            "What is certified",
            f"The learned inverse is {settings.depth} forward-backward layers on balanced sensors. All its maps are "
            f"made of "
            f"one matrix P, so that its singular values are enough: the layers amplify an error of the balanced data "
            f"by "
            f"at least {at_least(certificate.lower, 4)} (attained) and at most {at_most(certificate.upper, 4)}. With "
            f"the "
            f"norms of what comes before and after, errors of whitened data grow at most {at_most(bound)} times.",
        ),
        coherence_section(model, positions),
        recording_section(settings, run, listen),
    ]
    headline = (
        f"A learned inverse localises two dipoles to {learned['mean']:.1f} mm on average, dSPM to {dspm['mean']:.1f} mm"
    )
    summary = (
        f"Linear inverses, the mixed norm with its reweighted form, sparse Bayesian learning and a network of "
        f"{settings.depth} learned iterations look for dipoles in the field at 306 real sensor positions. The "
        f"network has "
        f"{sum(p.numel() for p in network.parameters()):,} parameters and takes {learned['milliseconds']:.1f} ms for "
        f"a window."
    )
    facts = {
        "learned, mean error, mm": learned["mean"],
        "dSPM, mm": dspm["mean"],
        "mixed norm, mm": dipoles["mixed norm"]["mean"],
        "certified amplification": "≤ " + at_most(bound),
    }
    return Page(headline, summary, sections, facts)


def _counted(active: list[int | None]) -> str:
    return "all" if active[0] is None else ", ".join(map(str, active))


def coherence_section(model: SourceModel, positions: Tensor) -> Section:
    """What breaks in the theory of analytic weights when columns are nearly parallel."""
    columns = model.gain[:, :, 0] / model.gain[:, :, 0].norm(dim=0)
    random = torch.randn(columns.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, D in (("real sensors", columns), ("Gaussian, same size", random / random.norm(dim=0))):
        alike = (D.mT @ D).abs()
        alike.fill_diagonal_(0)
        W = analytic_weights(D)
        cross = (W.mT @ D).abs()
        cross.fill_diagonal_(0)
        largest = float(torch.linalg.eigvals(W.mT @ D).real.max())
        sparsity = (1 + 1 / float(cross.max())) / 2
        rows.append(
            (name, float(alike.max()), float(alike.amax(0).median()), float(cross.max()), 2 / largest, sparsity)
        )
    return Section(
        "What analytic weights need and real sensors do not have",
        "The theory of ALISTA wants weights W with W^T D close to the identity: it guarantees recovery of less than "
        "(1 + 1/c) / 2 "
        "sources when c is the largest entry off the diagonal of W^T D. For a random matrix that allows a few; for "
        "real "
        "sensors, whose neighbouring sources have nearly the same field, less than two, so that it guarantees "
        "nothing about "
        "two dipoles. The certified step of its layers is below the last but one column.",
        (
            Table(
                ("dictionary", "coherence", "median of columns", "largest of W^T D", "largest step", "sources below"),
                rows,
            ),
        ),
    )


def recording_section(settings: MegSettings, run: RunFolder, listen: Listener) -> Section:
    """The real evoked response: where the methods see it."""
    recording = meg_sample()
    white = whitener(recording.covariance / int(recording.averages[settings.response]))
    gain = torch.einsum("km,mno->kno", white, recording.leadfield.gain)
    model = SourceModel(gain)
    inside = (recording.times >= settings.begin) & (recording.times <= settings.end)
    data = (recording.evoked[settings.response][inside] @ white.mT)[None]
    items = []
    strengths = {}
    for method in methods_of(model, None, settings.alpha):
        listen("note", {"text": f"localising a recorded response by {method.name}"})
        strength, active = method.estimate(data)
        strengths[method.name] = strength
        name = "sources-" + method.name.lower().replace(" ", "-")
        run.write(f"pictures/{name}.png", picture_of_sources(strength, recording.leadfield.positions))
        items.append((name, f"{method.name}" + (f", {active} active" if active is not None else "")))
    condition = recording.conditions[settings.response]
    return Section(
        "A recorded response",
        f"The response to “{condition}”, {1e3 * settings.begin:.0f} to {1e3 * settings.end:.0f} ms after the "
        f"stimulus, the "
        f"mean of {int(recording.averages[settings.response])} trials of the MNE sample recording, whitened by its "
        f"own noise "
        f"covariance (rank {len(white)} of {white.shape[1]}). The truth is not known; activity of the auditory "
        f"cortices, at "
        "the sides, is expected of sounds. Every picture shows the sources from above, from the left and from the "
        "right.",
        (Pictures(items, "Brighter and larger is stronger, relative to the strongest source of the method.", 2),),
    )


SMOKE = MegSettings(depth=2, components=4, epochs=1, steps=2, batch=2, seeds=2, windows=2)
FULL = MegSettings(depth=16, epochs=40, steps=100, windows=500)
STUDY = Study(
    "meg", "Source localisation", {"smoke": SMOKE, "default": MegSettings(), "full": FULL},
    lambda settings: "dipoles in the brain, from the magnetic field at 306 sensors", run_meg,
)  # fmt: skip
