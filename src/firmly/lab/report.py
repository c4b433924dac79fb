"""The report of a run: one HTML page without scripts or outside links, made from the files of the run folder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from firmly.lab.charts import Line, Mark, at_least, at_most, bracket_chart, dot_chart, line_chart, number
from firmly.lab.error_map import scale_bar
from firmly.lab.pictures import data_uri
from firmly.lab.run_folder import RunFolder

WIDE, NARROW = 720, 327  # CSS pixels of a chart on a desktop, and on a phone of 375 px less its margins

METHOD_NAMES = {
    "product": "product of norms",
    "averaged": "averaged recursion",
    "direct": "direct recursion",
    "virtual": "virtual network",
    "eclipse": "ECLipsE-Fast",
    "spectral": "spectral LMI",
    "lipsdp": "LipSDP per neuron",
    "exact": "exact over all slopes",
}


def write_report(run: RunFolder) -> Path:
    """Write `report.html` from `results.json`, the settings, the environment and the pictures of a run."""
    return run.write("report.html", render(run))


def render(run: RunFolder) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    results = run.read_json("results.json")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "at_most": at_most, "at_least": at_least}
    template = environment.from_string((files("firmly.lab") / "report.html.j2").read_text(encoding="utf-8"))
    methods = {m["key"]: m for m in results["methods"]}
    return template.render(
        r=results,
        methods=methods,
        ours=methods["ours"],
        twin=methods.get("twin"),
        environment=run.environment(),
        settings=run.settings_text(),
        folder=run.path.name,
        style=style(),
        pictures=pictures_of(run),
        charts=_charts(results, methods),
    )


def style() -> Markup:
    """The style sheet that all pages share."""
    return Markup((files("firmly.lab") / "page.css").read_text(encoding="utf-8"))


def pictures_of(run: RunFolder) -> dict[str, str]:
    return {path.stem: data_uri(path.read_bytes()) for path in sorted((run / "pictures").glob("*.png"))}


def _charts(results: dict[str, Any], methods: dict[str, Any]) -> dict[str, Markup]:
    charts = {}
    if results["certificate"]:
        charts["bracket"] = both(lambda width: _bracket(results, width))
    if any(results["history"].values()):
        charts["training"] = both(lambda width: _training(results, methods, width))
    if len(results["budgets"]) > 1:
        charts["budget"] = both(lambda width: _budget(results, width))
    if "largest" in results.get("errors", {}):
        charts["error scale"] = both(lambda width: scale_bar(results["errors"]["largest"], width))
    charts["images"] = both(lambda width: _images(results, methods, width))
    return charts


def both(draw: Callable[[int], Markup]) -> Markup:
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def _bracket(results: dict[str, Any], width: int) -> Markup:
    certificate = results["certificate"]
    bounds = sorted(certificate["bounds"], key=lambda b: -b["value"] if b["value"] is not None else -float("inf"))
    others = [b for b in bounds if b["method"] != certificate["method"]]
    marks = [Mark(_method(b["method"]), _value(b["value"]), "other", _upper(b["value"])) for b in others]
    marks.append(Mark(_method(certificate["method"]), certificate["upper"], "ours", _upper(certificate["upper"])))
    marks.append(Mark("attained", certificate["lower"], "ours", "≥ " + at_least(certificate["lower"])))
    beyond = []
    if results["twin"]:
        lower, upper = results["twin"]["lower"], results["twin"]["upper"]
        beyond.append(Mark("twin, proved", upper, "twin", _upper(upper)))
        beyond.append(Mark("twin, attained", lower, "twin", "≥ " + at_least(lower)))
    label = f"Bounds of the worst-case amplification: between {certificate['lower']:.4g} and {certificate['upper']:.4g}"
    return bracket_chart(certificate["lower"], certificate["upper"], marks, width, beyond, label)


def _training(results: dict[str, Any], methods: dict[str, Any], width: int) -> Markup:
    lines = []
    for key, rows in results["history"].items():
        points = [(r["epoch"] + 1, r["score"]) for r in rows if "score" in r]
        if points and key in methods:
            lines.append(Line(methods[key]["name"], points, methods[key]["role"]))
    label = "Validation PSNR of the networks over the epochs of training"
    return line_chart(lines, width, 240, "epoch", "validation PSNR, dB", label=label)


def _budget(results: dict[str, Any], width: int) -> Markup:
    points = sorted((b["worst_case"]["upper"], b["psnr"]) for b in results["budgets"])
    label = "Held-out PSNR against the certified bound of networks trained for different budgets"
    line = Line("", points, "ours")
    return line_chart([line], width, 260, "certified bound", "held-out PSNR, dB", log_x=True, dots=True, label=label)


def _images(results: dict[str, Any], methods: dict[str, Any], width: int) -> Markup:
    shown = [methods[k] for k in ("measured", "tv", "ours", "twin") if k in methods]
    series = [Line(m["name"], list(enumerate(m["per_image"]["psnr"])), m["role"]) for m in shown]
    label = "PSNR of every held-out photograph under each method"
    return dot_chart(results["images"], series, width, "dB", label)


def _method(name: str) -> str:
    return METHOD_NAMES.get(name, name)


def _upper(value: float | None) -> str:
    return "none" if value is None else "≤ " + at_most(value)


def _value(value: float | None) -> float:
    return float("inf") if value is None else value
