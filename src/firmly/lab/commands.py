"""What the commands of `firmly` do and print."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import firmly
from firmly.certificates import Certificate
from firmly.certificates import attack as find_attack
from firmly.certificates import certify as find_certificate
from firmly.certificates import verify as check_certificate
from firmly.data import catalogue, centre_crop, photographs, read_image
from firmly.errors import DataError, FirmlyError, SettingsError, StorageError
from firmly.lab.charts import at_least, at_most
from firmly.lab.experiments import EXPERIMENTS, find
from firmly.lab.models import FromRun, load_model
from firmly.lab.page import Table as PageTable
from firmly.lab.page import cell, from_values
from firmly.lab.pipeline import run_experiment
from firmly.lab.progress import Progress
from firmly.lab.report import write_report
from firmly.lab.run_folder import RunFolder, find_runs, new_folder
from firmly.lab.settings import preset, to_toml
from firmly.lab.study import Study, run_study, write_page


def start_run(experiment: str, assignments: Sequence[str], folder: Path | None, runs: Path, out: Console) -> int:
    """Run one experiment; the exit code is 0, or 130 if Ctrl-C stopped it."""
    chosen = find(experiment)
    name, settings = preset(chosen.presets, assignments)
    run = RunFolder(folder) if folder else new_folder(runs, experiment)
    began = time.monotonic()
    try:
        with Progress(out) as progress:
            if isinstance(chosen, Study):
                results = run_study(chosen, settings, name, run, progress)
            else:
                results = run_experiment(chosen, settings, name, run, progress)
    except KeyboardInterrupt:
        out.print(f"stopped; every whole epoch is kept. Go on with the same settings and --folder {run.path}")
        return 130
    if results is None:  # a process of a data-parallel training that writes nothing
        return 0
    if isinstance(chosen, Study):
        print_study(results, out)
    else:
        print_reconstruction(results, out)
    for path in sorted(
        p for p in run.path.rglob("*") if p.is_file() and p.parent.name not in ("pictures", "checkpoints")
    ):
        out.print(f"wrote {path}")
    if results.get("certificate"):
        out.print(f"verify with: firmly verify {run / 'certificate.safetensors'} {run.path}")
    out.print(f"{time.monotonic() - began:.0f} s")
    return 0


def print_study(results: dict[str, Any], out: Console) -> None:
    page = from_values(results["page"])
    out.print(page.headline, style="bold")
    for block in (b for s in page.sections for b in s.blocks if isinstance(b, PageTable)):
        columns = [Column(name, overflow="fold") for name in block.columns]  # a word cut short may be the answer
        table = Table(*columns, box=None, header_style="dim", title=block.caption or None, title_justify="left")
        for index, row in enumerate(block.rows):
            table.add_row(*map(cell, row), style="bold" if index in block.ours else "")
        out.print(table)


def print_reconstruction(results: dict[str, Any], out: Console) -> None:
    table = Table("method", "PSNR, dB", "SSIM", "worst-case amplification", box=None, header_style="dim")
    for m in results["methods"]:
        worst = m["worst_case"]
        bracket = "" if not worst else f"{at_least(worst['lower'])} .. {at_most(worst['upper'] or float('inf'))}"
        table.add_row(m["name"], f"{m['psnr']:.2f}", f"{m['ssim']:.4f}", bracket)
    out.print(table)
    certificate = results["certificate"]
    if certificate:
        gap = certificate["upper"] / certificate["lower"]
        out.print(
            f"certified: no error grows more than {certificate['upper']:.5g} times "
            f"({certificate['lower']:.5g} is attained, gap {gap:.3f}, by '{certificate['method']}')"
        )


def start_sweep(experiment: str, assignments: Sequence[str], runs: Path, out: Console) -> int:
    """One run for every combination of the values that slashes separate."""
    keys, choices = [], []
    for assignment in assignments:
        key, equals, values = assignment.partition("=")
        if not equals:
            raise SettingsError(f"a sweep is written KEY=VALUE1/VALUE2; given {assignment!r}")
        keys.append(key)
        choices.append(values.split("/"))
    combinations = [[f"{k}={v}" for k, v in zip(keys, values)] for values in itertools.product(*choices)]
    for combination in combinations:
        preset(find(experiment).presets, combination)  # a typing error is found before the first run
    for index, combination in enumerate(combinations):
        out.rule(f"{index + 1} of {len(combinations)}: {' '.join(combination)}")
        if code := start_run(experiment, combination, None, runs, out):
            return code
    list_runs(runs, out)
    return 0


def show_catalogue(out: Console) -> None:
    """Everything there is to choose from, with the settings of every experiment."""
    for experiment in EXPERIMENTS:
        default = experiment.presets["default"]
        of = "" if isinstance(experiment, Study) else "photographs "
        out.print(f"[bold]{experiment.name}[/]: {of}{experiment.told(default)}")
        out.print(f"  presets {', '.join(experiment.presets)}; settings and their defaults:")
        out.print("  " + escape(to_toml(default).strip().replace("\n", "  ·  ")), style="dim")
    import firmly.algorithms as algorithms
    import firmly.linear as linear
    import firmly.prox as prox

    rooms = (
        ("algorithms", algorithms, algorithms.Algorithm), ("priors", prox, prox.Prior),
        ("linear maps", linear, linear.LinearMap),
    )  # fmt: skip
    for title, room, kind in rooms:
        found = {name: getattr(room, name) for name in room.__all__}
        names = [name for name, c in found.items() if isinstance(c, type) and issubclass(c, kind) and c is not kind]
        out.print(f"[bold]{title}[/]: {', '.join(names)}")
    for split in ("train", "validation", "test"):
        out.print(f"[bold]photographs, {split}[/]: {', '.join(p.name for p in catalogue() if p.split == split)}")


def certify_model(
    model: str, output: Path | None, method: str, wrt: str, shape: str | None, out: Console, build: str | None = None
) -> None:  # fmt: skip
    network, origin = load_model(model, build)
    try:
        certificate = find_certificate(network, wrt=wrt, method=method, shape=parsed_shape(shape))  # type: ignore[arg-type]
    except FirmlyError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error
    print_certificate(certificate, out)
    target = output or default_target(model, origin)
    try:
        out.print(f"wrote {certificate.save(target)}")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


def default_target(model: str, origin: FromRun | None) -> Path:
    """Beside a file of weights, in a run folder, or in the working folder for a factory."""
    path = Path(model)
    if origin is None:
        return Path(model.replace(":", ".") + ".certificate.safetensors")
    return path / "certificate.safetensors" if path.is_dir() else path.with_suffix(".certificate.safetensors")


def print_certificate(certificate: Certificate, out: Console) -> None:
    table = Table("method", "upper bound", "seconds", "", box=None, header_style="dim")
    for b in certificate.bounds:
        style = "bold" if b.method == certificate.method else ""
        table.add_row(b.method, f"{b.value:.6g}", f"{b.seconds:.2f}", b.note, style=style)
    out.print(table)
    out.print(
        f"[bold]{certificate.lower:.6g} <= L <= {certificate.upper:.6g}[/] with respect to "
        f"{' and '.join(certificate.wrt)}, gap {certificate.gap:.4g}"
    )
    for sentence in certificate.assumptions:
        out.print(f"  assumes: {escape(sentence)}", style="dim")


def verify_certificate(
    path: Path, model: str, out: Console, build: str | None = None, exact: bool = False
) -> None:  # fmt: skip
    network, _ = load_model(model, build)
    try:
        certificate = check_certificate(path, network, exact=exact)
    except FileNotFoundError as error:
        raise StorageError(f"there is no certificate {path}") from error
    out.print(
        f"the certificate holds for these weights: {certificate.lower:.6g} <= L <= {certificate.upper:.6g} "
        f"with respect to {' and '.join(certificate.wrt)}" + (", proved in ball arithmetic" if exact else "")
    )


def attack_model(
    model: str, image: Path | None, radius: float, shape: str | None, out: Console, build: str | None = None
) -> None:  # fmt: skip
    network, origin = load_model(model, build)
    if origin is not None:
        size = origin.settings.size
        truth = centre_crop(read_image(image) if image else photographs("test")[0], size)[None]
        y = origin.experiment.measurement(origin.settings, size)(truth, torch.Generator().manual_seed(0))
    else:
        expected = parsed_shape(shape) or next(iter(getattr(network, "inputs", {}).values()), None)
        if expected is None:
            raise SettingsError("this module does not know the shape of its input: give it, as in --shape 3,32,32")
        y = read_image(image)[None] if image else torch.rand(1, *expected, generator=torch.Generator().manual_seed(0))
    if not radius > 0:
        raise SettingsError(f"the radius is positive; given {radius}")
    found = find_attack(network.requires_grad_(False), y, radius)
    out.print(
        f"a perturbation of norm {float(found.perturbation.norm()):.4g} moves the output by {found.change:.4g}: "
        f"an amplification of {found.ratio:.5g}, a lower bound of the worst case"
    )
    from firmly.lab.weights import pack

    target = RunFolder(Path()).write(
        "attack.safetensors", pack({"measurement": y, "perturbation": found.perturbation}, {"kind": "attack"})
    )
    out.print(f"wrote {target}")


def write_again(folder: Path, out: Console) -> None:
    run = RunFolder(folder)
    study = isinstance(find(run.environment()["experiment"]), Study)
    out.print(f"wrote {write_page(run) if study else write_report(run)}")


def list_runs(parent: Path, out: Console) -> None:
    found = find_runs(parent)
    if not found:
        out.print(f"there are no runs in {parent}; start one with: firmly run deblur")
        return
    table = Table("run", "preset", "started", "PSNR, dB", "certified", "seconds", box=None, header_style="dim")
    for run in found:
        environment, results = run.environment(), run.results()
        row = ["unfinished", "", ""]
        if results and "page" in results:
            row = ["", "", str(results["seconds"])]
        elif results:
            ours = next(m for m in results["methods"] if m["key"] == "ours")
            certificate = results["certificate"]
            bound = f"{certificate['upper']:.4g}" if certificate else "none"
            row = [f"{ours['psnr']:.2f}", bound, str(results["seconds"])]
        table.add_row(run.path.name, environment["preset"], environment["started"][:16].replace("T", " "), *row)
    out.print(table)


def compare_runs(folders: Sequence[Path], out: Console) -> None:
    """The settings in which runs differ, and their results, one column per run."""
    import tomllib

    runs = [RunFolder(folder) for folder in folders]
    settings = [tomllib.loads(run.settings_text()) for run in runs]
    table = Table("", *[run.path.name for run in runs], box=None, header_style="dim")
    for key in dict.fromkeys(k for s in settings for k in s):
        values = [str(s.get(key, "")) for s in settings]
        if len(set(values)) > 1:
            table.add_row(key, *values)
    results = [{"methods": [], **(run.results() or {})} for run in runs]
    for key in dict.fromkeys(m["name"] for r in results for m in r["methods"]):
        found = [next((m for m in r["methods"] if m["name"] == key), None) for r in results]
        table.add_row(f"{key}, dB", *[f"{m['psnr']:.3f}" if m else "" for m in found])
        bounds = [(m or {}).get("worst_case") for m in found]
        if any(bounds):
            table.add_row(f"{key}, bound", *[f"{b['upper']:.5g}" if b and b["upper"] else "" for b in bounds])
    out.print(table)


def run_benchmarks(arguments: Sequence[str], out: Console) -> int:
    """Run `python -m benchmarks` of a checkout with these arguments; returns its exit code."""
    if not Path("benchmarks/__main__.py").exists():
        raise SettingsError("the benchmarks are in the repository, not in the package: run this in a checkout")
    command = [sys.executable, "-m", "benchmarks", *arguments]
    out.print(" ".join(command), style="dim")
    return subprocess.run(command).returncode


def examine(out: Console) -> int:
    """Print the state of the installation; exit code 1 if something is broken."""
    import tempfile
    from importlib.metadata import PackageNotFoundError, version

    healthy = True
    out.print(f"firmly {firmly.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    out.print(f"CPU threads {torch.get_num_threads()}, CUDA {cuda}")
    for name in ("numpy", "scipy", "clarabel", "safetensors", "typer", "rich", "jinja2", "pillow"):
        try:
            out.print(f"  {name} {version(name)}")
        except PackageNotFoundError:
            healthy = False
            out.print(f"  {name} is missing: pip install {name}", style="red")
    for name, extra in (("lightning-fabric", "train"), ("PyWavelets", "wavelet"), ("deepinv", "imaging")):
        try:
            out.print(f"  {name} {version(name)} (extra)")
        except PackageNotFoundError:
            out.print(f"  {name} is not installed; pip install 'firmly\\[{extra}]' if you need it", style="dim")
    try:
        photographs("test")
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        certificate = find_certificate(network, shape=(4,))
        with tempfile.TemporaryDirectory() as folder:
            check_certificate(certificate.save(Path(folder) / "certificate.safetensors"), network)
        out.print("photographs read, a certificate made, saved and verified")
        RunFolder(Path()).write(".firmly-doctor", "ok").unlink()
        out.print(f"files can be written in {Path.cwd()}")
    except (FirmlyError, OSError) as error:
        healthy = False
        out.print(f"broken: {escape(str(error))}", style="red")
    out.print("everything is in order" if healthy else "something is broken, see above")
    return 0 if healthy else 1


def parsed_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"a shape is whole numbers with commas, such as 3,32,32; given {text!r}") from None
