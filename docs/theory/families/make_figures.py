"""Numbers, figures and tables of the article on unrolled algorithms.

python docs/theory/families/make_figures.py            # run everything and write it beside this file
python docs/theory/families/make_figures.py draw       # only draw again what results.json holds
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import experiments  # noqa: E402
import torch  # noqa: E402

from firmly.lab.charts import Line, Scale, at_least, at_most, legend, number, svg, text, thinned  # noqa: E402

NAMES = {
    "forward_backward": "Forward-backward",
    "fista": "FISTA",
    "hqs": "Half-quadratic splitting",
    "douglas_rachford": "Douglas-Rachford",
    "admm": "ADMM",
    "chambolle_pock": "Chambolle-Pock",
    "condat_vu": "Condat-Vu",
    "dual_forward_backward": "Dual forward-backward",
    "heavy_ball": "Heavy ball",
}
STYLE = """<style>text{font:13px sans-serif;fill:#333}.muted{fill:#777}.grid{stroke:#ddd}polyline{fill:none;
stroke-width:2}.a{stroke:#b9b9b9;fill:#b9b9b9}.b{stroke:#d08a3c;fill:#d08a3c}.c{stroke:#1d5b79;fill:#1d5b79}
.d{stroke:#3a9d5d;fill:#3a9d5d}.e{stroke:#8d5aa6;fill:#8d5aa6}.f{stroke:#c0392b;fill:#c0392b}polyline.a,polyline.b,
polyline.c,polyline.d,polyline.e,polyline.f{fill:none}polyline.d{stroke-dasharray:6 3}polyline.e{stroke-dasharray:2 3}
</style>"""
CURVES = {
    "product": ("product", "a"),
    "metric": ("metric", "e"),
    "norm": ("norm of k steps", "c"),
    "rate": ("asymptotic rate", "d"),
    "averaged": ("averaged", "b"),
    "certified": ("certified", "c"),
    "class": ("attained in the class", "d"),
    "attained": ("attained by this network", "e"),
    "jacobian": ("Jacobian at synthetic data", "d"),
    "exact": ("exact", "f"),
}


def chart(rows: Sequence[dict], keys: Sequence[str], x: str, x_name: str, title: str, log: bool = True) -> str:
    """Curves of some keys of the rows, without those that leave the frame of what is certified a thousandfold."""
    width, height, left, right, bottom = 620, 330, 52, 606, 282
    series = [
        Line(CURVES[k][0], [(r[x], r[k]) for r in rows if k in r and r[k] > 0], CURVES[k][1]) for k in keys
    ]  # fmt: skip
    series = [s for s in series if s.points]
    ceiling = 300 * max(r.get("certified", 1.0) for r in rows)  # far above, a curve would flatten the others
    values = [v for s in series for _, v in s.points if v <= ceiling]
    parts, top = legend(series, width)
    parts = [f'<g transform="translate(0,24)">{"".join(parts)}</g>', text(0, 14, title, "", "start")]
    top += 48
    across = Scale(min(r[x] for r in rows), max(r[x] for r in rows), left, right)
    up = Scale(min(values) / 1.08, max(values) * 1.08, bottom, top, log=log)
    for tick in thinned(up.ticks(), up, 18):
        parts.append(f'<line class="grid" x1="{left}" y1="{up(tick):.1f}" x2="{right}" y2="{up(tick):.1f}"/>')
        parts.append(text(left - 6, up(tick) + 4, number(tick), "muted", "end"))
    whole = all(float(r[x]).is_integer() for r in rows)
    for tick in [t for t in across.ticks(8) if not whole or float(t).is_integer()]:
        parts.append(text(across(tick), bottom + 20, number(tick), "muted"))
    parts.append(text(right, height - 6, x_name, "muted", "end"))
    for s in series:
        inside = [(across(a), up(v)) for a, v in s.points if v <= ceiling]
        if s.label != "exact":
            parts.append(f'<polyline class="{s.role}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in inside)}"/>')
        radius = 5 if s.label == "exact" else 3
        parts += [f'<circle class="{s.role}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in inside]
    drawn = str(svg(parts, width, height, title))
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def cells_of(row: dict, keys: Sequence[str]) -> list[str]:
    """Upper bounds rounded up, attained values down."""
    rounding = {"product": at_most, "averaged": at_most, "certified": at_most, "attained": at_least, "class": at_least}
    return [rounding.get(key, number)(row[key], 4) for key in keys]


# -- what is run ---------------------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[], object]] = {
    **{
        f"small/{name}": lambda name=name: experiments.curve(experiments.small()[name], experiments.DEPTHS, True)
        for name in NAMES
    },
    **{
        f"deconvolution/{name}": lambda name=name: experiments.curve(
            experiments.deconvolution()[name], experiments.DEPTHS, False
        )
        for name in NAMES
    },
    "inputs": lambda: experiments.inputs_table(experiments.deconvolution()),
    "varied": lambda: experiments.varied_table(experiments.small()),
    "step_sizes": experiments.step_sizes,
    "denoisers": experiments.denoisers,
    "heavy_ball_transient": experiments.heavy_ball_transient,
    "metric": experiments.metric,
    "weakly_convex": experiments.weakly_convex,
    "no_common_basis": experiments.no_common_basis,
}


def main(wanted: Sequence[str]) -> None:
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, experiment in RUNS.items():
        if wanted == ["draw"] or (wanted and not any(name.startswith(w) for w in wanted)):
            continue
        results[name] = rounded(experiment())
        print(name, flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)


def rounded(value: object) -> object:
    """Seven digits: what the figures show, and what another machine reproduces."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def draw(results: dict) -> None:
    def write(name: str, content: str) -> None:
        (HERE / name).write_text(content)

    small = ("product", "averaged", "certified", "class", "exact")
    large = ("product", "averaged", "certified", "attained", "jacobian")
    for name, title in NAMES.items():
        if f"small/{name}" in results:
            rows = results[f"small/{name}"]
            write(f"{name}_small.svg", chart(rows, small, "depth", "layers", f"{title}, three unknowns"))
        if f"deconvolution/{name}" in results:
            rows = results[f"deconvolution/{name}"]
            write(f"{name}_deconvolution.svg", chart(rows, large, "depth", "layers", f"{title}, deconvolution"))
    if "step_sizes" in results:
        keys = ("product", "averaged", "certified", "attained")
        write("step_sizes.svg", chart(results["step_sizes"], keys, "step", "step, times L", "Ten layers, steps"))
    if "metric" in results:
        keys = ("product", "metric", "averaged", "certified", "class", "exact")
        write("metric.svg", chart(results["metric"], keys, "depth", "layers", "Chambolle-Pock, from (x, u) to x"))
    if "denoisers" in results:
        rows = [r for rs in results["denoisers"].values() for r in rs][:3]
        keys = ("averaged", "certified", "exact", "attained")
        write("denoisers.svg", chart(rows, keys, "depth", "layers", "Dual forward-backward denoiser", log=False))
    if "heavy_ball_transient" in results:
        rows = results["heavy_ball_transient"][:12]
        title = "Heavy ball, from a state to the state k steps later"
        write("heavy_ball_transient.svg", chart(rows, ("norm", "rate"), "depth", "steps", title, log=False))
    for name, tabulate in TABLES.items():
        if name in results:
            write(f"{name}.inc", tabulate(results[name]))
    if all(f"{p}/{n}" in results for p in ("small", "deconvolution") for n in NAMES):
        for name, content in zip(("gaps_small.inc", "gaps_deconvolution.inc"), gaps(results)):
            write(name, content)


def gaps(results: dict) -> tuple[str, str]:
    """One table for each problem: the deepest networks, and the deepest whose slopes were enumerated."""
    small, large = [], []
    for name, title in NAMES.items():
        link, rows = f"[{title}]({name}.md)", results[f"small/{name}"]
        exact, last = [r for r in rows if "exact" in r][-1], rows[-1]
        ratio = {"certified": exact["certified"] / exact["exact"]}
        cells = [str(exact["depth"]), *cells_of(exact, ("exact", "certified")), *cells_of(ratio, ("certified",))]
        ratio = {"certified": last["certified"] / last["class"]}
        small.append([link, *cells, *cells_of(last, ("class", "certified")), *cells_of(ratio, ("certified",))])
        deep = results[f"deconvolution/{name}"][-1]
        deep = {**deep, "attained": max(deep["attained"], deep["jacobian"])}
        ratio = {"certified": deep["certified"] / deep["attained"]}
        keys = ("product", "averaged", "certified", "attained")
        large.append([link, *cells_of(deep, keys), *cells_of(ratio, ("certified",))])
    head = ["family", "layers", "exact", "certified", "ratio", "20 layers: attained in the class", "certified", "ratio"]
    return table(head, small), table(["family", "product", "averaged", "certified", "attained", "ratio"], large)


def inputs(rows: list[dict]) -> str:
    found = {(r["family"], r["wrt"]): " .. ".join(cells_of(r, ("attained", "certified"))) for r in rows}
    body = [[title, *(found[name, wrt] for wrt in ("data", "start", "both"))] for name, title in NAMES.items()]
    return table(["family", "data", "start", "both"], body)


def varied(rows: list[dict]) -> str:
    keys = ("product", "averaged", "certified", "class", "attained")
    head = ["family", "product", "averaged", "certified", "attained in the class", "by this network"]
    return table(head, [[NAMES[r["family"]], *cells_of(r, keys)] for r in rows])


def weakly_convex(rows: list[dict]) -> str:
    keys = ("parameter", "slope", "product", "averaged", "certified", "exact", "attained")
    head = ["prior", "concavity or a", "steepest slope", *keys[2:6], "by this network"]
    return table(head, [[r["prior"], *cells_of(r, keys)] for r in rows])


def no_common_basis(rows: list[dict]) -> str:
    keys = ("product", "averaged", "certified", "attained")
    body = [[r["case"], r["basis"], "; ".join(r["relaxed"]) or "nothing", *cells_of(r, keys)] for r in rows]
    return table(["network", "basis", "relaxed", *keys], body)


def denoisers(found: dict[str, list[dict]]) -> str:
    keys = ("averaged", "certified", "exact", "attained")
    body = [[name, str(r["depth"]), *cells_of(r, keys)] for name, rows in found.items() for r in rows]
    return table(["operator", "layers", "averaged", "certified", "exact over the class", "attained by l1"], body)


TABLES = {
    "inputs": inputs,
    "varied": varied,
    "weakly_convex": weakly_convex,
    "no_common_basis": no_common_basis,
    "denoisers": denoisers,
}

if __name__ == "__main__":
    main(sys.argv[1:])
