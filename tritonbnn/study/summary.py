"""From the logs of a grid to tables, and to sentences that claim no more than they show."""

from collections.abc import Iterable
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from tritonbnn.study.plan import STUDIES, Claim, Comparison, Variant
from tritonbnn.train.log import Line

Results = dict[str, dict[int, dict[str, float]]]
"""Measured values by variant's name, seed and quantity; a run that failed is absent."""

UNITS = {"top1": 1.0, "flip_flop": 1e3, "c2i_half": 1.0}
"""What a table shows, and what it is multiplied by there."""

CAUTION = "A grid of this size says nothing about ImageNet."

WINDOW = (
    "All is of the step with 1-bit weights: top-1 and C2I of its last epoch, C2I against the"
    " weights that it started from, and the FF ratio as the mean over its epochs but the last, in"
    " which no weight moves. Its first epochs flip most, so a shorter step has the larger mean."
)


def measured(log: list[Line]) -> dict[str, float]:
    """What one run gives, all of it from the step with 1-bit weights.

    top1 and c2i are of the last epoch, so that nothing is chosen on the validation images;
    best_top1 is the best epoch's. flip_flop and revived are means over the epochs whose learning
    rate is not 0, and dead is of the last of these.
    """
    lines = [line for line in log if line["step"] == 2]
    if not lines:
        return {}
    values = {"top1": lines[-1]["val_top1"], "best_top1": max(line["val_top1"] for line in lines)}
    values |= _analysis(lines[-1:], ("c2i_half", "c2i_full", "saturation"))
    moving = [line for line in lines if line["lr"] > 0]
    return values | _analysis(moving, ("flip_flop", "revived")) | _analysis(moving[-1:], ("dead",))


def _analysis(lines: list[Line], keys: Iterable[str]) -> dict[str, float]:
    """Means over the lines that know a quantity; a quantity that none knows is absent."""
    found = {}
    for key in keys:
        known = [line["analysis"][key] for line in lines if key in line.get("analysis", {})]
        if known:
            found[key] = mean(known)
    return found


def spread(runs: dict[int, dict[str, float]], quantity: str) -> dict[str, Any] | None:
    """Mean, sample standard deviation, ends and values by seed; None where nobody knows it."""
    values = {seed: run[quantity] for seed, run in runs.items() if quantity in run}
    if not values:
        return None
    found = list(values.values())
    return {
        "mean": mean(found),
        "deviation": stdev(found) if len(found) > 1 else None,
        "lowest": min(found),
        "highest": max(found),
        "by_seed": values,
    }


def verdict(claim: Claim, results: Results) -> str:
    """Whether the means stand in the claimed order, and whether the seeds of rows are apart."""
    rows = [spread(results.get(variant.name, {}), claim.quantity) for variant in claim.rising]
    known = [row for row in rows if row]
    if len(known) < len(rows):
        return "cannot be told: runs are missing"
    pairs = list(pairwise(known))
    if all(low["mean"] < high["mean"] for low, high in pairs):
        said = "reproduces at this scale"
        apart = all(low["highest"] < high["lowest"] for low, high in pairs)
    else:
        said = "does not reproduce at this scale"
        apart = any(high["highest"] < low["lowest"] for low, high in pairs)
    if min(len(row["by_seed"]) for row in known) < 2:
        return f"{said}, in one seed"
    return said if apart else f"{said} in the means, but the seeds overlap"


def summary(studies: Iterable[str], results: Results, failed: dict[str, str]) -> dict[str, Any]:
    """All that ``study.json`` says of the results."""
    quantities = sorted({q for runs in results.values() for run in runs.values() for q in run})
    comparisons = {}
    for name in studies:
        comparison = STUDIES[name]
        comparisons[name] = {
            "rows": [_row(variant, results, quantities) for variant in comparison.variants],
            "orders": [
                {"claim": claim.text, "verdict": verdict(claim, results)}
                for claim in comparison.claims
            ],
        }
    return {"caution": CAUTION, "window": WINDOW, "comparisons": comparisons, "failed": failed}


def _row(variant: Variant, results: Results, quantities: list[str]) -> dict[str, Any]:
    spreads = {q: spread(results.get(variant.name, {}), q) for q in quantities}
    return {
        "variant": variant.name,
        "title": variant.title,
        "published_imagenet": variant.published,
        "measured": {quantity: found for quantity, found in spreads.items() if found},
    }


def markdown(studies: Iterable[str], results: Results, failed: dict[str, str], scale: str) -> str:
    """The tables beside the paper's numbers, and a sentence for each order.

    Args:
        studies: which.
        results: of their runs.
        failed: why runs failed, by folder.
        scale: what was trained, and for how long.
    """
    parts = [f"# Studies\n\n{scale} {CAUTION}\n\n{WINDOW}\n"]
    parts += [_section(STUDIES[name], results) for name in studies]
    if failed:
        parts.append("## Failed runs\n\n" + "\n".join(f"- {k}: {v}" for k, v in failed.items()))
    return "\n".join(parts).rstrip() + "\n"


def _section(comparison: Comparison, results: Results) -> str:
    head = "| | seeds | top-1, % | FF ratio, 1e-3 | C2I (2p - 1) | paper: top-1, % | FF, 1e-3 |"
    lines = [f"## {comparison.title}\n", head, "|---|---|---|---|---|---|---|"]
    for variant in comparison.variants:
        runs = results.get(variant.name, {})
        cells = [variant.title, str(len(runs))]
        cells += [_cell(spread(runs, quantity), factor) for quantity, factor in UNITS.items()]
        for quantity in ("top1", "flip_flop"):
            value = variant.published.get(quantity)
            cells.append("" if value is None else f"{value * UNITS[quantity]:.4g}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for claim in comparison.claims:
        lines.append(f"- That {claim.text}: {verdict(claim, results)}.")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None, factor: float) -> str:
    if found is None:
        return ""
    text = f"{found['mean'] * factor:.4g}"
    deviation = found["deviation"]
    return text if deviation is None else f"{text} ± {deviation * factor:.2g}"
