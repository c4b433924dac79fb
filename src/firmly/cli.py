"""The command line: it reads arguments, calls the lab, prints what was written. No logic lives here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

# Threads that spin while they wait are a hundredfold slowdown where another program uses the cores as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console

from firmly.errors import FirmlyError

app = typer.Typer(
    help="Networks from optimisation algorithms, with stability certificates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)

Method = Literal["auto", "product", "averaged", "direct", "virtual", "eclipse", "spectral", "lipsdp", "exact"]
Runs = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]
Model = Annotated[
    str, typer.Argument(help="A run folder, a file (.onnx, .pt2, .safetensors), or package.module:factory.")
]
Build = Annotated[
    str | None, typer.Option("--model", help="package.module:factory of the network that a .safetensors file is for.")
]


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="One of the experiments of 'firmly list'.")],
    settings: Annotated[list[str] | None, typer.Argument(help="preset=smoke|default|full and KEY=VALUE.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The run folder; one that exists is gone on with.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Train, certify, attack and report an experiment on real images."""
    from firmly.lab.commands import start_run

    raise typer.Exit(start_run(experiment, settings or [], folder, runs, out))


@app.command()
def sweep(
    experiment: Annotated[str, typer.Argument(help="One of the experiments of 'firmly list'.")],
    settings: Annotated[list[str], typer.Argument(help="KEY=VALUE, or KEY=VALUE1/VALUE2/... for one run each.")],
    runs: Runs = Path("runs"),
) -> None:
    """Run an experiment for every combination of values."""
    from firmly.lab.commands import start_sweep

    raise typer.Exit(start_sweep(experiment, settings, runs, out))


@app.command("list")
def list_() -> None:
    """Experiments with their settings, algorithms, priors, linear maps and photographs."""
    from firmly.lab.commands import show_catalogue

    show_catalogue(out)


@app.command()
def certify(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the certificate goes.")] = None,
    method: Annotated[Method, typer.Option(help="The bound to compute; auto tries all that apply.")] = "auto",
    wrt: Annotated[str, typer.Option(help="The input that is perturbed: data, start or both.")] = "data",
    shape: Annotated[str | None, typer.Option(help="Shape of the input without the batch, such as 3,32,32.")] = None,
    build: Build = None,
) -> None:
    """Bound how far the output of a model can move, print the table and write the certificate."""
    from firmly.lab.commands import certify_model

    certify_model(model, output, method, wrt, shape, out, build)


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(help="The certificate file.")],
    model: Model,
    build: Build = None,
    exact: Annotated[bool, typer.Option("--exact", help="Prove it again in ball arithmetic (extra: exact).")] = False,
) -> None:
    """Check a certificate against a model without any solver; exit code 0 only if it holds."""
    from firmly.lab.commands import verify_certificate

    verify_certificate(certificate, model, out, build, exact)


@app.command()
def attack(
    model: Model,
    image: Annotated[Path | None, typer.Option(help="An image file (default: a held-out photograph).")] = None,
    radius: Annotated[float, typer.Option(help="Largest Euclidean norm of the perturbation.")] = 0.5,
    shape: Annotated[str | None, typer.Option(help="Shape of the input without the batch, such as 3,32,32.")] = None,
    build: Build = None,
) -> None:
    """Search the perturbation of a measurement that moves the output of a model most."""
    from firmly.lab.commands import attack_model

    attack_model(model, image, radius, shape, out, build)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run again from its files."""
    from firmly.lab.commands import write_again

    write_again(run, out)


@app.command("runs")
def runs_(
    compare: Annotated[list[Path] | None, typer.Argument(help="Run folders to compare setting by setting.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """List the runs of a folder, or compare some of them."""
    from firmly.lab.commands import compare_runs, list_runs

    compare_runs(compare, out) if compare else list_runs(runs, out)


@app.command()
def bench(
    claims: Annotated[list[str] | None, typer.Argument(help="Claims (all if none is given), and quick=true.")] = None,
) -> None:
    """Measure the claims of the documentation (in a checkout of the repository)."""
    from firmly.lab.commands import run_benchmarks

    raise typer.Exit(run_benchmarks(claims or [], out))


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, a certificate made and verified, a place to write."""
    from firmly.lab.commands import examine

    raise typer.Exit(examine(out))


def main() -> None:
    """Entry point: what firmly refuses is one sentence and exit code 2, without a traceback."""
    try:
        app()
    except FirmlyError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"firmly: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
