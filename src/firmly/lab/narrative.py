"""The sentences of the report, written from the numbers of a run."""

from __future__ import annotations

from typing import Any

from firmly import __version__
from firmly.lab.charts import at_least, at_most, number
from firmly.lab.reconstruction import Experiment, ReconstructionSettings


def network_name(name: str, main: str) -> str:
    """How the tables call a network."""
    if name == "unconstrained":
        return "Unconstrained twin"
    if name.startswith("budget-"):
        return f"Budget {name.removeprefix('budget-')}"
    return "Certified" if name == main else "Certified, no budget"


def tell(experiment: Experiment, settings: ReconstructionSettings, results: dict[str, Any]) -> dict[str, Any]:
    """All texts of the report."""
    methods = {m["key"]: m for m in results["methods"]}
    return {
        "title": experiment.title,
        "version": __version__,
        "headline": headline(experiment, results),
        "summary": summary(experiment, settings, results, methods),
        "scene_text": scene_text(experiment, settings, results),
        "baseline_text": baseline_text(settings, results),
        "stability_text": stability_text(results),
        "twin_text": twin_text(results, methods),
        "no_certificate": "No finite bound is known for this network: `metrics.jsonl` holds the reason.",
        "attack_text": attack_text(results),
        "error_text": error_text(results),
        "budget_text": budget_text(results, methods),
        "training_text": training_text(settings, results),
        "credits": "named with their licences in the package, firmly/data/images/LICENCES.md.",
    }


def headline(experiment: Experiment, results: dict[str, Any]) -> str:
    certificate = results["certificate"]
    noun = {"deblur": "deblurring", "denoise": "denoising", "inpaint": "inpainting", "mri": "MRI"}.get(
        experiment.name, experiment.name
    )
    article = "An" if noun[0] in "aeiouM" else "A"
    if not certificate:
        return f"{article} {noun} network"
    return f"{article} {noun} network that never amplifies an error more than {at_most(certificate['upper'])} times"


def summary(
    experiment: Experiment, settings: ReconstructionSettings, results: dict[str, Any], methods: dict[str, Any]
) -> str:
    ours, certificate, twin = methods["ours"], results["certificate"], methods.get("twin")
    text = (
        f"{settings.depth} iterations of half-quadratic splitting became {settings.depth} layers of a network, which "
        f"learned to restore photographs {experiment.told(settings)}. On photographs it has never seen it reaches "
        f"{ours['psnr']:.2f} dB, {compared(ours['psnr'], methods['tv']['psnr'])} total variation. "
    )
    if certificate:
        gap = certificate["upper"] / certificate["lower"]
        text += (
            f"For every measurement there is, a proof bounds how far the image can move when the measurement moves: "
            f"at most {at_most(certificate['upper'])} times as far; {at_least(certificate['lower'])} is attained, so "
            f"the bound is {closeness(gap)}. "
        )
    if twin:
        worst = results["twin"]
        text += f"Without the constraint the same network reaches {twin['psnr']:.2f} dB"
        if worst and certificate and worst["lower"] > 1.05 * certificate["upper"]:
            text += f" and amplifies an error at least {at_least(worst['lower'])} times"
        elif worst and certificate and worst["upper"] > 1.05 * certificate["upper"]:
            text += f", but nothing better than {at_most(worst['upper'])} is proved for it"
        elif not worst:
            text += ", and no finite bound is known for it"
        text += "."
    return text


def compared(ours: float, other: float) -> str:
    gain = ours - other
    return f"{abs(gain):.2f} dB {'above' if gain >= 0 else 'below'} the best"


def closeness(gap: float) -> str:
    if gap < 1.0005:
        return "sharp"
    return f"within {100 * (gap - 1):.2g}% of the truth" if gap < 2 else f"within a factor {gap:.2g} of the truth"


def scene_text(experiment: Experiment, settings: ReconstructionSettings, results: dict[str, Any]) -> str:
    name = results["images"][results["scene"]]
    return (
        f"The photograph '{name}' is one of the held-out ones, {settings.size} by {settings.size} pixels, "
        f"{experiment.told(settings)}. The numbers under the pictures are for this photograph alone."
    )


def baseline_text(settings: ReconstructionSettings, results: dict[str, Any]) -> str:
    tuned = results["tuned"]
    text = (
        f"The weight of total variation ({tuned['tv']:g}) is the best of {len(settings.tv_weights)} on these very "
        "photographs, which favours it"
    )
    if "wiener" in tuned:
        return text + f"; so is that of the Wiener filter ({tuned['wiener']:g}), whose prior is the spectrum 1/f²."
    return text + ". There is no Wiener filter here: with pixels missing, the measurement mixes frequencies."


def stability_text(results: dict[str, Any]) -> str:
    c = results["certificate"]
    if not c:
        return ""
    product = next((b["value"] for b in c["bounds"] if b["method"] == "product"), None)
    text = (
        f"If two measurements differ by d, the two images differ by at most {at_most(c['upper'], 4)} |d|, whatever the "
        f"measurements and however large d. Two measurements in the certificate do reach {at_least(c['lower'], 4)}. "
    )
    if product and product > 1.05 * c["upper"]:
        text += (
            f"Norms alone, with every term of every layer at its own worst, would say {number(product)}: "
            f"{number(product / c['upper'], 2)} times too much."
        )
    return text


def twin_text(results: dict[str, Any], methods: dict[str, Any]) -> str:
    if "twin" not in methods:
        return ""
    twin = results["twin"]
    price = methods["twin"]["psnr"] - methods["ours"]["psnr"]
    start = (
        "The twin has the same layers and the same training, but no limit on its filters; it scores "
        f"{f'{abs(price):.2f} dB ' + ('more' if price > 0 else 'less') if abs(price) >= 0.005 else 'the same'}. "
    )
    if not twin:
        return start + "No finite bound is known for it."
    return start + (
        f"Its worst case lies between {at_least(twin['lower'])} (attained) and {at_most(twin['upper'])} "
        f"(proved, by '{twin['method']}')."
    )


def attack_text(results: dict[str, Any]) -> str:
    found = results["attack"]
    ours, twin = found["ours"], found.get("twin")
    text = (
        f"An attacker may change this measurement by {number(found['radius'])} in Euclidean norm, "
        f"{found['share']:.0%} of the norm of the noise that is there anyway, and looks for the pattern that moves "
        f"the image most. The image of our network moves {number(ours['ratio'])} times as far and goes from "
        f"{ours['psnr_before']:.2f} to {ours['psnr_after']:.2f} dB"
    )
    if twin:
        text += (
            f"; that of the twin, under its own worst pattern, {number(twin['ratio'])} times as far, from "
            f"{twin['psnr_before']:.2f} to {twin['psnr_after']:.2f} dB"
        )
    return text + "."


def error_text(results: dict[str, Any]) -> str:
    found = results["errors"]
    if "reason" in found:
        return f"There is no certified map of the change of single pixels here: {found['reason']}."
    radius, row, column = number(results["attack"]["radius"]), *found["pixel"]
    text = f"For every perturbation of this measurement of norm up to {radius}, "
    if found["smallest"] == found["largest"]:
        text += f"no pixel changes by more than {at_most(found['largest'])}, where 1 is from black to white. "
        if found["everywhere"]:
            text += (
                "It is one number for all pixels and all measurements: the layers treat all places alike, and nothing "
                "but their weights and slopes enters. "
            )
    else:
        text += (
            f"no pixel changes by more than {at_most(found['largest'])}, where 1 is from black to white, and the "
            f"calmest by no more than {at_most(found['smallest'])}. "
        )
    return text + (
        f"The attack above, on the whole image, changes its pixels by up to {number(found['attacked'])}; one on the "
        f"pixel in row {row}, column {column} alone changes it by {number(found['aimed'])}, so that the bound is at "
        f"most {at_most(found['largest'] / max(found['attacked'], found['aimed']), 2)} times too large. Up to the norm "
        f"{at_least(found['tolerated'])} no pixel can change by more than a tenth of the range from black to white."
    )


def budget_text(results: dict[str, Any], methods: dict[str, Any]) -> str:
    budgets = results["budgets"]
    if not budgets:
        return ""
    if len(budgets) == 1:
        b, free = budgets[0], methods.get("certified")
        proved = at_most(b["worst_case"]["upper"], 4)
        text = f"The network was trained within the budget of {number(b['budget'])}: {proved} is proved."
        if free:
            text += f" Against the network without a budget this cost {free['psnr'] - b['psnr']:.2f} dB."
        return text
    return (
        "The same network was trained once for every budget: with a penalty on the certified bound while it learned, "
        "and at the end with the small change of its weights that makes the proof hold."
    )


def training_text(settings: ReconstructionSettings, results: dict[str, Any]) -> str:
    seconds = results["training_seconds"]
    times = ", ".join(f"{network_name(n, results['main']).lower()} {s:.0f} s" for n, s in seconds.items())
    return (
        f"{settings.epochs} epochs of {settings.steps} batches of {settings.batch} crops of {settings.crop} by "
        f"{settings.crop} pixels from the training photographs, AdamW, mean squared error, seed {settings.seed}; "
        f"{results['parameters']:,} parameters. {capping(settings)}Time: {times}."
    )


def capping(settings: ReconstructionSettings) -> str:
    if settings.cap is None:
        return ""
    return (
        "The filters of every layer are divided by the root of a certified bound of their power, so that their slope "
        f"stays within {settings.cap:g} at every step of training and not only at its end. "
    )
