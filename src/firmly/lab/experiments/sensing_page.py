"""The report of compressed sensing: pictures, scores beside bounds, and what can and cannot be certified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from firmly.lab.charts import Line, at_least, at_most
from firmly.lab.page import Chart, Page, Pictures, Section, Table
from firmly.lab.pictures import busiest, detail, png
from firmly.lab.run_folder import RunFolder

if TYPE_CHECKING:
    from firmly.lab.experiments.compressed_sensing import Bounds, Projection, Row, SensingSettings

DETAIL = 88  # pixels of the enlarged part
Curves = Mapping[str, Sequence[tuple[float, float]]]


def page(
    settings: SensingSettings,
    run: RunFolder,
    truth: Tensor,
    scene: int,
    rows: Sequence[Row],
    bounds: Bounds,
    projection: Projection | None,
    curves: Curves,
) -> Page:
    linear, _, rival, ours = rows
    certified = certified_bound(bounds)
    gain = ours.psnr - linear.psnr
    summary = (
        f"From {settings.ratio:.0%} of the measurements of {len(truth)} held-out photographs the certified network "
        f"reaches {ours.psnr:.2f} dB, {rival.name} with as many parameters {rival.psnr:.2f} dB, and the linear "
        f"reconstruction that both start from {linear.psnr:.2f} dB. A perturbation of the data moves the image of the "
        f"certified network by at most {at_most(certified)} times its size, whatever the image; no such number that "
        f"would "
        f"mean anything is known of {rival.name}."
    )
    facts = {
        "dB over the linear start": f"{gain:+.2f}",
        f"dB of {rival.name} over it": f"{rival.psnr - linear.psnr:+.2f}",
        "certified bound": at_most(certified),
        "reached by an attack": at_least(bounds.ours_attacked),
    }
    sections = [
        scores(rows, bounds, settings),
        pictures(run, truth[scene], rows, scene),
        certificate(bounds, rival.name, settings),
    ]
    if projection is not None:
        sections.append(put_back(projection, rival.name))
    if curves:
        lines = [Line(name, points, "ours" if name == ours.name else "other") for name, points in curves.items()]
        chart = Chart(lines, "measurements, % of the pixels", "PSNR, dB", dots=True)
        sections.append(Section("More and fewer measurements", "Every network was trained for its ratio.", (chart,)))
    return Page(headline(ours, rival, certified), summary, sections, facts)


def certified_bound(bounds: Bounds) -> float:
    return min(bounds.closed_form, bounds.spectral)


def headline(ours: Row, rival: Row, certified: float) -> str:
    difference = ours.psnr - rival.psnr
    if abs(difference) < 0.05:
        price = f"as good as {rival.name}"
    else:
        price = f"{abs(difference):.1f} dB {'above' if difference > 0 else 'below'} {rival.name}"
    return f"A worst-case gain of at most {at_most(certified)}, {price}"


def scores(rows: Sequence[Row], bounds: Bounds, settings: SensingSettings) -> Section:
    ends = {
        rows[0].name: (f"{at_most(bounds.start_norm)} (exact)", None),
        rows[2].name: ("none" if bounds.rival_bound is None else at_most(bounds.rival_bound), bounds.rival_attacked),
        rows[3].name: (at_most(certified_bound(bounds)), bounds.ours_attacked),
    }
    table = Table(
        ("", "parameters", "PSNR, dB", "SSIM", f"PSNR, noise {settings.more_noise:g}", "certified gain", "attacked"),
        [
            (
                r.name,
                r.parameters,
                f"{r.psnr:.2f}",
                f"{r.ssim:.3f}",
                f"{r.noisy_psnr:.2f}",
                *ends.get(r.name, ("", None)),
            )
            for r in rows
        ],
        "Means over the held-out photographs. The gain is the largest ratio of a change of the image to the change of "
        "the data that causes it: no pair of data exceeds the certified one, and the attack has found the other. Total "
        "variation has the best of the weights tried on these very images, for the data without additional noise.",
        ours=(3,),
    )
    return Section("Quality beside stability", "", (table,))


def pictures(run: RunFolder, truth: Tensor, rows: Sequence[Row], scene: int) -> Section:
    size = min(DETAIL, truth.shape[-1] // 3)
    top, left = busiest(truth, size)
    items = []
    for name, caption, image in [
        ("original", "The original", truth),
        *(
            (f"method-{k}", f"{row.name}: {row.psnr:.2f} dB over all images", row.image[scene])
            for k, row in enumerate(rows)
        ),
    ]:
        run.write(f"pictures/{name}.png", png(image))
        enlarged = detail(image, top, left, size).repeat_interleave(2, -1).repeat_interleave(2, -2)
        run.write(f"pictures/{name}-detail.png", png(enlarged))
        items += [(f"{name}.png", caption), (f"{name}-detail.png", "a part of it, enlarged")]
    return Section("Pictures", "", (Pictures(items, columns=2),))


def certificate(bounds: Bounds, rival: str, settings: SensingSettings) -> Section:
    text = (
        "Every layer of the certified network is x <- D(x - t A*(A x - y)) with a learned D that is a gradient step on "
        f"a convex ridge, held to slopes in [{1 - settings.cap:g}, 1] while it is trained. For such layers the squares "
        "add up: L^2 = |Q|^2 + sum t / (2 - t |A|^2), where products of norms grow by t in every layer. The bound by "
        "multipliers is found by a search: it treats each D as one nonlinearity of the whole image and sees the "
        "operator through its singular values, of which a sampling with orthonormal rows has only 0 and 1. Both depend "
        "on nothing but these values, the steps and the slopes, so that they hold at every image size"
        + (" of whole blocks.\n\n" if settings.task == "blocks" else ".\n\n")
    )
    if bounds.rival_bound is None:
        text += f"{rival} has no certificate: {' '.join(bounds.rival_reason.split()).rstrip('.')}."
    else:
        text += (
            f"Of {rival} only the norms of its convolutions are known. Their product over all layers bounds its gain "
            f"by {at_most(bounds.rival_bound)}, which says nothing; that an attack found no more than "
            f"{at_least(bounds.rival_attacked)} is no proof that there is not more. Its layers are not proximal maps, "
            "whatever their steps are: the learned transforms before and after the threshold are not adjoint."
        )
    table = Table(
        ("bound of the certified network", "gain"),
        [
            ("|Q| alone, the norm of its start", at_most(bounds.start_norm)),
            ("closed form", at_most(bounds.closed_form)),
            ("shared multipliers, verified", at_most(bounds.spectral)),
            ("reached by an attack (a lower bound)", at_least(bounds.ours_attacked)),
        ],
        f"Shared multipliers prove |change|^2 <= {at_most(bounds.rho[0], 4)} |d|^2 + {at_most(bounds.rho[1], 4)} "
        "|Q d|^2 for a change d of the data.",
        ours=(1 if bounds.closed_form <= bounds.spectral else 2,),
    )
    return Section("What is certified, and what is not", text, (table,))


def put_back(projection: Projection, rival: str) -> Section:
    check = projection.check
    steps = sum(e.kind == "step" for e in check.broken)
    thresholds = len(check.broken) - steps
    cost = projection.before - projection.after
    text = (
        "A gradient step x - rho A*(A x - y) is nonexpansive only for rho in [0, 2 / |A|^2], and a soft threshold only "
        "for theta >= 0. Training does not know of this. "
    )
    if check.holds:
        text += (
            f"In this run all steps and thresholds of {rival} have stayed in their range; those that its authors "
            "published, trained longer, have not."
        )
    else:
        text += (
            f"{steps} steps and {thresholds} thresholds of {rival} have left their range. Putting them back takes its "
            f"PSNR from {projection.before:.2f} to {projection.after:.2f} dB, a loss of {cost:.2f} dB."
        )
    text += " To be inside is necessary for a certificate layer by layer, and not sufficient."
    rows = [(e.name, e.kind, f"{e.low:.4g}", "" if e.holds else "outside") for e in check.entries]
    table = Table(("", "kind", "value", ""), rows, f"The limit of the steps is {check.limit:.6g}.")
    return Section("Steps and thresholds of the rival, checked", text, (table,))
