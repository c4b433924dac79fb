"""Dictionaries learned from photographs: what they look like, what they denoise, and what is certified."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import firmly as fm
from firmly.data import centre_crop, photographs
from firmly.lab.baselines import tune_tv
from firmly.lab.charts import Line, at_least, at_most
from firmly.lab.experiments import dictionary_toys as toys
from firmly.lab.metrics import psnr
from firmly.lab.page import Chart, Page, Pictures, Section, Table
from firmly.lab.pictures import png
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.weights import pack, unpack
from firmly.priors import KSvd, Online, SparseModel, Unrolled, learn_dictionary, omp
from firmly.priors.learning import Method
from firmly.priors.patches import cosine_dictionary, image_from, patches_of

SIZE = 8  # of patches
WEIGHT = 0.15  # of the l1 norm, for patches of unit norm


@dataclass(frozen=True)
class DictionarySettings:
    """`patches` are learned from, `sparsity` is that of K-SVD, `noise` the standard deviation on images in [0, 1] of
    `crop` pixels; `depth` layers are certified; `signals`, `rounds` and `depths` are of the toys."""

    patches: int = 10_000
    atoms: int = 256
    sparsity: int = 5
    iterations: int = 10
    noise: float = 0.1
    crop: int = 96
    images: int = 4
    depth: int = 10
    signals: int = 1000
    rounds: int = 80
    depths: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 200, 500)
    dimension: int = 30
    seed: int = 2022
    threads: int = 0

    def __post_init__(self) -> None:
        side = math.isqrt(self.atoms)
        require(side**2 == self.atoms and side >= SIZE, f"atoms is a square of at least 64; given {self.atoms}")
        require(self.patches >= 100, f"patches is at least 100; given {self.patches}")
        require(1 <= self.sparsity <= 64, f"sparsity is from 1 to 64; given {self.sparsity}")
        require(min(self.iterations, self.images, self.depth, self.rounds) >= 1, "counts are at least 1")
        require(self.noise > 0, f"noise is positive; given {self.noise}")
        require(self.crop >= 2 * SIZE, f"crop is at least {2 * SIZE}; given {self.crop}")
        require(self.signals >= 100 and self.dimension >= 10, "the toys have at least 100 signals and 10 dimensions")
        require(bool(self.depths) and min(self.depths) >= 1, "depths are at least 1")


class Trained(NamedTuple):
    """A dictionary, what learning it took, and its error on patches that it has not seen."""

    name: str
    dictionary: Tensor
    seconds: float | None
    replaced: int | None
    error: float


def run(settings: DictionarySettings, run: RunFolder, listen: Listener) -> Page:
    def tell(name: str, done: int, total: int) -> None:
        listen("work", {"name": name, "done": done, "total": total})

    generator = torch.Generator().manual_seed(settings.seed)
    train = unit_patches(photographs("train"), settings.patches, generator)
    held_out = unit_patches(photographs("validation"), 2000, generator)
    found = learn_all(settings, run, train, held_out, tell)
    atoms = atoms_section(settings, run, found)
    denoising, best, tv_score = denoising_section(settings, run, found, generator, tell)
    toy = toys.gradient_toy(settings.seed, settings.signals)
    recovery, scores = recovery_section(settings, toy, tell)
    gradients = gradient_section(settings, toy, tell)
    several = operators_section(settings, tell)
    certificate, cert = certificate_section(settings, run, found, listen)
    return Page(
        f"Denoising with a learned dictionary reaches {best:.2f} dB, with total variation {tv_score:.2f} dB",
        f"{settings.atoms} atoms of {SIZE} x {SIZE} pixels were learned from {settings.patches} patches of the "
        "training photographs by K-SVD, online and unrolled learning. Images of the test split are denoised patch by "
        "patch. Where the true dictionary is known, recovery, gradients and several operators show what learning can "
        "and cannot do.",
        (atoms, denoising, certificate, recovery, gradients, several),
        {
            "denoising, learned (dB)": round(best, 2),
            "denoising, total variation (dB)": round(tv_score, 2),
            "recovery, best": round(max(scores), 4),
            "certified bound of the coder": at_most(cert.upper),
        },
    )


def unit_patches(images: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Random patches without their mean, of norm 1; flat ones are left out: (count, 64)."""
    found = [patches_of(image, SIZE, stride=3) for image in images]
    drawn = torch.cat([p[torch.randperm(len(p), generator=generator)[: 4 * count // len(found) + 1]] for p in found])
    drawn = drawn - drawn.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(drawn, dim=1)
    kept = drawn[norms > 0.2] / norms[norms > 0.2, None]
    return kept[torch.randperm(len(kept), generator=generator)[:count]]


def learn_all(
    settings: DictionarySettings, run: RunFolder, train: Tensor, held_out: Tensor, tell: toys.Tell
) -> list[Trained]:
    """All dictionaries; those that the run folder has already are taken from there."""
    few = train[: max(100, settings.patches // 10)]
    batches = [-(-len(train) // size) for size in (2000, 256)]
    early = settings.iterations // 2  # K-SVD goes through mini-batches first
    jobs: list[tuple[str, Method, Tensor, int, int]] = [
        ("K-SVD", KSvd(settings.sparsity, batch_size=2000), train, settings.iterations,
         early * batches[0] + settings.iterations - early),
        ("online", Online(WEIGHT, batch_size=256), train, settings.iterations, settings.iterations * batches[1]),
        ("unrolled", Unrolled(SparseModel(WEIGHT), 20, through=10), few, 2 * settings.iterations,
         2 * settings.iterations),
    ]  # fmt: skip
    cosine = cosine_dictionary(SIZE, settings.atoms).to(train.dtype)
    found = [Trained("cosine", cosine, None, None, held_out_error(cosine, held_out, settings.sparsity))]
    for name, method, data, iterations, total in jobs:

        def say(k: int, dictionary: Tensor, objective: float, name=name, total=total) -> None:
            tell(f"learning, {name}", k, total)

        path = run / f"weights/{name}.safetensors"
        if not path.exists():
            learned = learn_dictionary(
                data, method, start=cosine, iterations=iterations, seed=settings.seed, callback=say
            )
            learned = toys.whole(learned)
            header = {"kind": "dictionary", "seconds": learned.seconds, "replaced": learned.replaced}
            run.write(f"weights/{name}.safetensors", pack({"dictionary": learned.dictionary}, header))
        tensors, header = unpack(path)
        dictionary = tensors["dictionary"]
        error = held_out_error(dictionary, held_out, settings.sparsity)
        found.append(Trained(name, dictionary, header["seconds"], header["replaced"], error))
    return found


def held_out_error(dictionary: Tensor, patches: Tensor, sparsity: int) -> float:
    """The mean of |y - D z|^2 / |y|^2 with pursuit to the sparsity."""
    return float((patches - omp(dictionary, patches, sparsity).synthesise(dictionary)).square().sum(1).mean())


def atoms_section(settings: DictionarySettings, run: RunFolder, found: list[Trained]) -> Section:
    rows, pictures = [], []
    for name, dictionary, seconds, replaced, error in found:
        rows.append((name, 100 * error, seconds, replaced))
        run.write(f"pictures/atoms-{name}.png", png(tiles(dictionary)))
        pictures.append((f"atoms-{name}.png", name))
    table = Table(
        ("dictionary", f"error with {settings.sparsity} atoms, %", "seconds", "atoms replaced"), rows,
        "Energy that is left of unseen patches (validation photographs, mean removed, unit norm).", (1, 2, 3),
    )  # fmt: skip
    return Section(
        "Atoms",
        "All start from the cosine dictionary. K-SVD is for what the table shows; online and unrolled learning "
        f"minimise the l1 objective with weight {WEIGHT}, the unrolled one on a tenth of the patches.",
        (table, Pictures(pictures, "Every tile is an atom of 8 x 8 pixels, scaled to its own range.")),
    )


def tiles(dictionary: Tensor) -> Tensor:
    """All atoms as a picture (1, height, width), each scaled to its own range."""
    side = math.isqrt(dictionary.shape[1])
    atoms = dictionary.mT.reshape(-1, SIZE, SIZE)
    atoms = 0.5 + 0.5 * atoms / atoms.abs().amax((1, 2), keepdim=True)
    padded = torch.nn.functional.pad(atoms, (0, 1, 0, 1), value=1.0)
    picture = padded.reshape(side, side, SIZE + 1, SIZE + 1).transpose(1, 2).reshape(side * (SIZE + 1), -1)
    return picture.repeat_interleave(2, 0).repeat_interleave(2, 1)[None]


def denoise(dictionary: Tensor, noisy: Tensor, noise: float) -> Tensor:
    """Every patch, without its mean, by as few atoms as leave 1.15 noise 8 in norm; the mean over all patches.

    Source: Elad and Aharon, 2006, without the last blend with the noisy image.
    """
    patches = patches_of(noisy, SIZE)
    means = patches.mean(1, keepdim=True)
    code = omp(dictionary, patches - means, sparsity=SIZE * SIZE // 2, tolerance=1.15 * noise * SIZE)
    return image_from(code.synthesise(dictionary) + means, tuple(noisy.shape))


def denoising_section(
    settings: DictionarySettings, run: RunFolder, found: list[Trained], generator: torch.Generator, tell: toys.Tell
) -> tuple[Section, float, float]:
    truth = torch.cat([centre_crop(i, settings.crop) for i in photographs("test")[: settings.images]])
    noisy = truth + settings.noise * torch.randn(truth.shape, generator=generator)
    results = {"noisy": noisy}
    for done, trained in enumerate(found):
        results[f"sparse, {trained.name}"] = denoise(trained.dictionary, noisy, settings.noise)
        tell("denoising", done + 1, len(found) + 1)
    shape = (1, settings.crop, settings.crop)
    weights = [settings.noise * factor for factor in (0.5, 0.7, 0.9, 1.1)]
    tuned = tune_tv(fm.linear.Identity(shape), noisy[:, None], truth[:, None], weights)
    results["total variation"] = tuned.images[:, 0]
    tell("denoising", len(found) + 1, len(found) + 1)
    scores = {name: psnr(images[:, None], truth[:, None]) for name, images in results.items()}
    rows = [(name, float(score.mean()), float(score.min()), float(score.max())) for name, score in scores.items()]
    pictures = []
    shown = int(truth.flatten(1).var(1).argmax())
    for name in ("noisy", "sparse, cosine", "sparse, online", "total variation"):
        file = f"denoised-{name.replace(', ', '-').replace(' ', '-')}.png"
        run.write(
            f"pictures/{file}", png(results[name][shown : shown + 1].repeat_interleave(2, 1).repeat_interleave(2, 2))
        )
        pictures.append((file, f"{name}, {float(scores[name][shown]):.2f} dB"))
    table = Table(("method", "PSNR, dB", "worst", "best"), rows, f"{len(truth)} test photographs.", (2, 3, 4))
    best = max(float(scores[f"sparse, {t.name}"].mean()) for t in found[1:])
    text = (
        f"White noise of standard deviation {settings.noise:g} on crops of {settings.crop} x {settings.crop} pixels. "
        "Every patch is coded by orthogonal matching pursuit until the residual is that of the noise, and overlapping "
        "patches are averaged. The weight of total variation is tuned on these very images, which favours it."
    )
    return Section("Denoising", text, (table, Pictures(pictures))), best, float(scores["total variation"].mean())


def certificate_section(
    settings: DictionarySettings, run: RunFolder, found: list[Trained], listen: Listener
) -> tuple[Section, fm.Certificate]:
    listen("note", {"text": "certifying a sparse coder of the learned dictionary"})
    rows, certificates = [], []
    for name, dictionary, *_ in found[:2]:
        algorithm = fm.algorithms.ForwardBackward(fm.linear.Dense(dictionary.double()), fm.prox.L1(WEIGHT))
        certificate = fm.certify(fm.unroll(algorithm, settings.depth, learn=()), wrt="data")
        certificates.append(certificate)
        rows.append((name, at_least(certificate.lower), at_most(certificate.upper), certificate.method))
    certificates[1].save(run / "certificate.safetensors")
    distance, jump = pursuit_jump(found[1].dictionary.double())
    text = (
        f"Certified: the codes of {settings.depth} unrolled iterations, z(y) from ISTA on the dictionary with weight "
        f"{WEIGHT}. No perturbation of a patch, however clever, moves its code by more than the upper bound times its "
        "norm; the lower end is attained. Not certified, because it is not true: orthogonal matching pursuit, with "
        "which the images above are denoised, has no Lipschitz constant. Where two atoms tie it is discontinuous: here "
        f"two patches at a distance of {distance:.0e} have codes at a distance of {jump:.2f}. Not certified, because "
        f"nothing "
        "here proves it: that learning finds the best dictionary. The problem is not convex; a method only lowers its "
        "objective."
    )
    table = Table(("dictionary", "lower", "upper", "method"), rows, "Lipschitz constant from patch to code.", (1,))
    return Section("What is certified, and what is not", text, (table,)), certificates[1]


def pursuit_jump(dictionary: Tensor) -> tuple[float, float]:
    """The distance of two signals on both sides of a tie of pursuit, found by bisection, and that of their codes."""
    near, far = dictionary[:, 0], dictionary[:, 1]
    for _ in range(30):
        middle = (near + far) / 2
        if int((middle @ dictionary).abs().argmax()) == 0:
            near = middle
        else:
            far = middle
    codes = omp(dictionary, torch.stack([near, far]), 1).dense()
    return float((near - far).norm()), float((codes[0] - codes[1]).norm())


def recovery_section(settings: DictionarySettings, toy: toys.Toy, tell: toys.Tell) -> tuple[Section, list[float]]:
    found = toys.recoveries(toy, settings.rounds, tell)
    scores = [r.scores[-1][1] for r in found]
    rows = [(r.name, r.scores[0][1], r.scores[-1][1], r.objective) for r in found]
    lines = [Line(r.name, r.scores, role) for r, role in zip(found, ("twin", "ours", "other"))]
    text = (
        "50 atoms of length 30, signals with 30 % of them and noise of 0.1. The score is the mean of |cos| between "
        "true "
        "and learned atoms under the best assignment."
    )
    table = Table(("method", "score at the start", "score", "objective"), rows, "", (1, 2))
    chart = Chart(lines, "round", "recovery score")
    return Section("Recovery of a known dictionary", text, (table, chart)), scores


def gradient_section(settings: DictionarySettings, toy: toys.Toy, tell: toys.Tell) -> Section:
    lines = toys.gradient_errors(toy, settings.depths, tell)
    text = (
        "At the start of the same problem, the gradient in the dictionary of the objective after T steps of ISTA "
        "against that after infinitely many, as a relative error, by the steps that backpropagation goes through. "
        "While the support is wrong, backpropagation makes it "
        "worse than taking the codes for constants; once it is nearly right, backpropagation pays, and the last "
        "steps keep part "
        "of the gain."
    )
    chart = Chart(lines, "steps T", "relative error of the gradient", log_x=True, log_y=True)
    return Section("Does it pay to differentiate through the codes?", text, (chart,))


def operators_section(settings: DictionarySettings, tell: toys.Tell) -> Section:
    rows_of = settings.dimension // 2
    seen = toys.operators_toy(
        (1, 2, 6), settings.dimension, rows_of, 2 * settings.signals, settings.rounds, settings.seed, tell
    )
    table = Table(
        ("operators", "dimensions unseen", "|cos| unseen by the first, at the start", "|cos|, learned", "recovery"),
        [(s.operators, s.blind, s.hidden_start, s.hidden, s.recovery) for s in seen], "", (1, 2),
    )  # fmt: skip
    text = (
        f"Signals of {settings.dimension} entries are seen through random operators of {rows_of} rows. The atoms "
        "start right where the first operator sees them, and at random on its null space. With one operator nothing is "
        "learned there, whatever the method: firmly refuses unless told blind=True. Several operators that see all "
        "of the space "
        "together teach more of it the more they are."
    )
    return Section("Learning from incomplete data", text, (table,))


def told(settings: DictionarySettings) -> str:
    return f"{settings.atoms} atoms of {SIZE} x {SIZE} pixels from {settings.patches} patches of photographs"


STUDY = Study(
    "dictionary",
    "Dictionary learning",
    {
        "smoke": DictionarySettings(
            patches=400, atoms=64, sparsity=3, iterations=2, crop=32, images=1, depth=3, signals=100, rounds=3,
            depths=(2, 5, 10), dimension=10,
        ),
        "default": DictionarySettings(),
        "full": DictionarySettings(
            patches=100_000, iterations=30, crop=200, signals=1000, rounds=120,
            depths=(2, 5, 10, 20, 50, 100, 200, 500, 1000), dimension=100,
        ),
    },
    told,
    run,
)  # fmt: skip
