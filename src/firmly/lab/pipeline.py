"""What `firmly run` does: train, compare, certify, attack, report. Everything that is written is in the run folder."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates import Certificate, attack, certify, verify
from firmly.data import Crops, catalogue, centre_crop, photographs
from firmly.errors import NotCertifiable, NotDiagonal
from firmly.lab import narrative
from firmly.lab.baselines import tune_tv, tune_wiener, wiener_filter
from firmly.lab.budget import BudgetPenalty, repair
from firmly.lab.engine import Engine, start_engine
from firmly.lab.error_map import map_errors
from firmly.lab.metrics import psnr, ssim
from firmly.lab.pictures import busiest, detail, png, signed
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.lab.report import write_report
from firmly.lab.run_folder import RunFolder
from firmly.lab.training import Outcome, train
from firmly.lab.weights import learned, restore, save_weights

VALIDATION_SIZE = 128
DETAIL = 64  # pixels of the enlarged part

Event = dict[str, Any]
Listener = Callable[[str, Event], None]  # (stage, what happened)


@dataclass
class Networks:
    """The trained networks by name, on the test size, with how they were trained."""

    main: str = "certified"
    networks: dict[str, nn.Module] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)


def run_experiment(
    experiment: Experiment, settings: ReconstructionSettings, preset: str, run: RunFolder, listen: Listener
) -> dict[str, Any] | None:
    """Run an experiment in a folder, going on from its checkpoints if there are any; returns the results.

    Returns None on the processes of a data-parallel training that write nothing. `KeyboardInterrupt` after Ctrl-C, with
    every whole epoch kept.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    engine = start_engine(settings.device, settings.precision)
    if engine.primary:
        run.begin(experiment.name, preset, settings)
    engine.barrier()
    began = time.monotonic()
    trained = train_all(experiment, settings, run, engine, listen)
    if not engine.primary:
        return None
    torch.manual_seed(settings.seed)
    results = evaluate(experiment, settings, run, trained, listen)
    results["seconds"] = round(time.monotonic() - began, 1)
    run.write_json("results.json", results)
    listen("report", {"path": write_report(run)})
    return results


# -- training ------------------------------------------------------------------------------------------------------


def train_all(
    experiment: Experiment, settings: ReconstructionSettings, run: RunFolder, engine: Engine, listen: Listener
) -> Networks:
    """Train the capped network, its unconstrained twin, and one network for every budget."""
    trained = Networks()

    def fit(name: str, cap: float | None, start: nn.Module | None = None, **options: Any) -> nn.Module:
        torch.manual_seed(settings.seed)
        network = experiment.network(settings, settings.crop, cap)
        if start is not None:
            restore(network, {k: v.cpu() for k, v in learned(start).items()}, "the network to start from")
        plan = options.pop("plan", settings.plan())
        outcome = train(
            network,
            sampler(experiment, settings),
            plan,
            run,
            name,
            validate=validation(experiment, settings, cap),
            engine=engine,
            callback=lambda event: listen("training", {"name": name, "total": plan.epochs * plan.steps, **event}),
            **options,
        )
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        trained.outcomes[name] = outcome
        trained.networks[name] = experiment.resized(settings, network, settings.size, cap)
        return network

    capped = fit("certified", settings.cap)
    if settings.twin and settings.cap is not None:
        fit("unconstrained", None)
    for budget in settings.budget:
        name = f"budget-{budget:g}"
        plan = settings.plan(epochs=settings.budget_epochs)
        fit(name, settings.cap, start=capped, plan=plan, penalty=BudgetPenalty(budget, settings.steps))
        if engine.primary:
            heard = functools.partial(listen_to_repair, listen, name)
            trained.certificates[name] = repair(trained.networks[name], budget, heard)
    if len(settings.budget) == 1:
        trained.main = f"budget-{settings.budget[0]:g}"
    return trained


def listen_to_repair(listen: Listener, name: str, bound: float) -> None:
    listen("repair", {"name": name, "bound": bound})


def sampler(
    experiment: Experiment, settings: ReconstructionSettings
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Batches of noisy measurements of random crops of the training photographs."""
    crops = Crops(photographs("train"), settings.crop)
    measure = experiment.measurement(settings, settings.crop)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = crops.batch(settings.batch, generator)
        return measure(x, generator), x

    return sample


def validation(
    experiment: Experiment, settings: ReconstructionSettings, cap: float | None
) -> Callable[[nn.Module], float]:
    """Mean PSNR on the validation photographs, always with the same noise."""
    x = torch.stack([centre_crop(image, VALIDATION_SIZE) for image in photographs("validation")])
    y = experiment.measurement(settings, VALIDATION_SIZE)(x, torch.Generator().manual_seed(settings.seed + 1))

    def score(network: nn.Module) -> float:
        larger = experiment.resized(settings, network, VALIDATION_SIZE, cap)
        with torch.no_grad():
            return float(psnr(larger(y).real, x).mean())

    return score


# -- evaluation ----------------------------------------------------------------------------------------------------


def held_out(experiment: Experiment, settings: ReconstructionSettings) -> tuple[list[str], Tensor, Tensor]:
    """Names, truth and measurements of the held-out photographs, always with the same noise."""
    names = [p.name for p in catalogue() if p.split == "test"][: settings.images]
    truth = torch.stack([centre_crop(image, settings.size) for image in photographs("test")[: settings.images]])
    measure = experiment.measurement(settings, settings.size)
    return names, truth, measure(truth, torch.Generator().manual_seed(settings.seed + 2))


@torch.no_grad()
def evaluate(
    experiment: Experiment, settings: ReconstructionSettings, run: RunFolder, trained: Networks, listen: Listener
) -> dict[str, Any]:
    """Compare, certify, attack; save weights, certificates and pictures; returns the content of `results.json`."""
    names, truth, y = held_out(experiment, settings)
    scene = names.index(settings.scene) if settings.scene in names else 0
    A = experiment.operator(settings, settings.size)
    images = {"measured": experiment.shown(A, y)}
    rows = [row("measured", experiment.measured_name, "data", images["measured"], truth)]
    tuned: dict[str, float] = {}
    try:
        listen("baseline", {"name": "Wiener"})
        wiener = tune_wiener(A, y, truth, settings.wiener_weights)
        norm = wiener_filter(A, wiener.weight).norm()
        rows.append(row("wiener", "Wiener filter", "other", wiener.images, truth, norm.lower, norm.upper, exact=True))
        images["wiener"], tuned["wiener"] = wiener.images, wiener.weight
    except NotDiagonal:
        pass  # the narrative says why there is none
    listen("baseline", {"name": "TV"})
    best = tune_tv(A, y, truth, settings.tv_weights)
    rows.append(row("tv", "Best TV", "other", best.images, truth))
    images["tv"], tuned["tv"] = best.images, best.weight

    certificates = certify_all(settings, trained, run, listen)
    last = [n for n in (trained.main, "unconstrained") if n in trained.networks]
    for name in [*(n for n in trained.networks if n not in last), *last]:
        key = key_of(name, trained)
        role = key if name in last else "other"
        restored = trained.networks[name](y).real
        found = certificates[name]
        lower, upper = (found.lower, found.upper) if found else (None, None)
        rows.append(row(key, narrative.network_name(name, trained.main), role, restored, truth, lower, upper))
        images[key] = restored
        save_weights(run / f"weights/{name}.safetensors", trained.networks[name], describe(experiment, settings, name))

    attacked, worst = attack_all(experiment, settings, run, trained, y[[scene]], truth[[scene]], listen)
    listen("note", {"text": "bounding the error of every pixel"})
    main, seconds = trained.networks[trained.main], settings.certify_seconds / 3
    errors = map_errors(run, main, y[[scene]], worst, attacked["radius"], certificates[trained.main], seconds)
    results = {
        "experiment": experiment.name,
        "main": trained.main,
        "methods": rows,
        "images": names,
        "scene": scene,
        "size": settings.size,
        "tuned": tuned,
        "certificate": certificate_facts(certificates[trained.main]),
        "twin": certificate_facts(certificates.get("unconstrained")),
        "attack": attacked,
        "errors": errors,
        "budgets": [
            {"budget": budget, **next(r for r in rows if r["key"] == key_of(f"budget-{budget:g}", trained))}
            for budget in settings.budget
        ],
        "history": {key_of(name, trained): outcome.history for name, outcome in trained.outcomes.items()},
        "training_seconds": {n: round(o.seconds, 1) for n, o in trained.outcomes.items()},
        "parameters": sum(p.numel() for p in trained.networks[trained.main].parameters()),
    }
    results["detail"] = save_pictures(run, truth, images, scene)
    return results | narrative.tell(experiment, settings, results)


def key_of(name: str, trained: Networks) -> str:
    """How the report calls a network: "ours", "twin", or its own name."""
    return {trained.main: "ours", "unconstrained": "twin"}.get(name, name)


def row(
    key: str, name: str, role: str, image: Tensor, truth: Tensor,
    lower: float | None = None, upper: float | None = None, exact: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One method in the table: its scores, and its worst-case amplification if it is bounded."""
    worst = None if lower is None else {"lower": lower, "upper": finite(upper), "exact": exact}
    return {"key": key, "name": name, "role": role, **scores(image, truth), "worst_case": worst}


def scores(image: Tensor, truth: Tensor) -> dict[str, Any]:
    each = {"psnr": psnr(image, truth), "ssim": ssim(image, truth)}
    return {
        "psnr": float(each["psnr"].mean()),
        "ssim": float(each["ssim"].mean()),
        "per_image": {name: values.tolist() for name, values in each.items()},
    }


def certify_all(
    settings: ReconstructionSettings, trained: Networks, run: RunFolder, listen: Listener
) -> dict[str, Certificate | None]:
    """Certify every network, save the certificates and verify each from its file; None where no bound exists."""
    certificates: dict[str, Certificate | None] = {}
    for name, network in trained.networks.items():
        listen("certify", {"name": name})
        try:
            certificate = trained.certificates.get(name) or certify(network, budget_s=settings.certify_seconds)
        except NotCertifiable as reason:
            run.log("not certifiable", network=name, reason=str(reason))
            certificates[name] = None
            continue
        path = run / (f"certificates/{name}.safetensors" if name != trained.main else "certificate.safetensors")
        certificate.save(path)
        certificates[name] = verify(path, network)
        bracket = {"lower": certificate.lower, "upper": certificate.upper, "method": certificate.method}
        run.log("certificate", network=name, **bracket)
    return certificates


@torch.enable_grad()
def attack_all(
    experiment: Experiment, settings: ReconstructionSettings, run: RunFolder, trained: Networks,
    y: Tensor, truth: Tensor, listen: Listener,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """The worst perturbations found for the main network and for its twin, at a fraction of the norm of the noise: the
    facts of both, and that of the main one."""
    radius = settings.attack * max(settings.noise, 1e-3) * math.sqrt(y.numel())
    found: dict[str, Any] = {"radius": radius, "share": settings.attack}
    perturbation = torch.zeros_like(y)
    for key, name in (("ours", trained.main), ("twin", "unconstrained")):
        if name not in trained.networks:
            continue
        listen("attack", {"name": name})
        network = trained.networks[name].requires_grad_(False)
        worst = attack(network, y, radius)
        before, after = network(y).real, network(y + worst.perturbation).real
        found[key] = {
            "ratio": worst.ratio,
            "change": worst.change,
            "psnr_before": float(psnr(before, truth)),
            "psnr_after": float(psnr(after, truth)),
        }
        pattern = experiment.shown(experiment.operator(settings, settings.size), worst.perturbation)[0]
        run.write(f"pictures/attack-{key}.png", png(after[0]))
        run.write(f"pictures/attack-{key}-perturbation.png", png(signed(pattern, float(pattern.abs().max()) or 1.0)))
        if key == "ours":
            perturbation = worst.perturbation
    return found, perturbation


def save_pictures(run: RunFolder, truth: Tensor, images: dict[str, Tensor], scene: int) -> list[int]:
    """Write the pictures of one scene and their enlarged parts; returns (top, left, size) of the part."""
    size = min(DETAIL, truth.shape[-1] // 4)
    top, left = busiest(truth[scene], size)
    for key, batch in {"truth": truth, **images}.items():
        if key in ("truth", "measured", "wiener", "tv", "ours", "twin"):
            run.write(f"pictures/{key}.png", png(batch[scene]))
            run.write(f"pictures/{key}-detail.png", png(detail(batch[scene], top, left, size)))
    return [top, left, size]


def describe(experiment: Experiment, settings: ReconstructionSettings, name: str) -> dict[str, Any]:
    """What the JSON beside a file of weights says."""
    constrained = name != "unconstrained"
    return {"experiment": experiment.name, "network": name, "constrained": constrained, "size": settings.size}


def certificate_facts(certificate: Certificate | None) -> dict[str, Any] | None:
    """A certificate as plain values, infinite bounds as None."""
    if certificate is None:
        return None
    return {
        "lower": certificate.lower,
        "upper": certificate.upper,
        "method": certificate.method,
        "basis": certificate.basis.name,
        "bounds": [
            {"method": b.method, "value": finite(b.value), "seconds": b.seconds, "note": b.note}
            for b in certificate.bounds
        ],
        "assumptions": certificate.assumptions,
    }


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
