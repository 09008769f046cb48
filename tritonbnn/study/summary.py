"""From the logs of a grid to tables, and to sentences that claim no more than they show.

``study.json`` holds what was trained and every seed's numbers. Means, ranges, verdicts and all
words are made from them anew whenever a page is written. So none is older than this code.
"""

from collections.abc import Iterable
from itertools import combinations, pairwise
from statistics import mean, stdev
from typing import Any

from tritonbnn.study.plan import STUDIES, Claim, Comparison, Variant
from tritonbnn.train.config import Config
from tritonbnn.train.log import Line

Results = dict[str, dict[Any, dict[str, float]]]
"""Measured values by variant's name, seed and quantity; a run that failed is absent."""

Settings = dict[str, Any]
"""What was trained; see :func:`settings`."""

UNITS = {"top1": 1.0, "flip_flop": 1e3, "c2i_half": 1.0}
"""What a table shows, and what it is multiplied by there."""

SAMPLED = "flip_flop_sampled"
"""What stands for flip_flop where some updates of an epoch were counted, and not all."""

WINDOW = (
    "All is of the step with 1-bit weights. Top-1 and C2I are of its last epoch, C2I against the"
    " weights that it started from. The FF ratio is the mean over its epochs but the last, in which"
    " no weight moves. Its first epochs flip most, so a shorter step has the larger mean."
)

SAMPLES = (
    "The FF ratio was not counted over all updates, but over a sample in which an epoch's first"
    " update weighs too much."
)


def settings(config: Config, seeds: int, sgd_lr: float) -> Settings:
    """What is trained, and for how long."""
    return {
        "recipe": config.recipe,
        "model": config.model,
        "width": config.width,
        "batch_size": config.batch_size,
        "step1_epochs": config.stage("step1").epochs,
        "step2_epochs": config.stage("step2").epochs,
        "seeds": seeds,
        "adam_lr": config.stage("step2").lr,
        "sgd_lr": sgd_lr,
    }


def scale(given: Settings) -> str:
    """What was trained, in words."""
    first, second = given["step1_epochs"], given["step2_epochs"]
    return (
        f"{given['recipe']}: {given['model']} at width {given['width']:g},"
        f" {first} + {second} epochs in two steps or {first + second} in one,"
        f" {_seeds(given)}, batch {given['batch_size']},"
        f" Adam at {given['adam_lr']:g}, SGD at {given['sgd_lr']:g}."
    )


def _seeds(given: Settings) -> str:
    return f"{given['seeds']} seed{'s' if given['seeds'] > 1 else ''}"


def caution(given: Settings, studies: Iterable[str]) -> str:
    """What must not be concluded."""
    decide = "decide" if given["seeds"] > 1 else "decides"
    said = (
        f"{_seeds(given)} at {given['step1_epochs']} + {given['step2_epochs']} epochs {decide}"
        " nothing about the paper's claims: a grid of this size says nothing about ImageNet."
    )
    if "optimizers" in studies:
        said += (
            " Each optimiser has one learning rate in the table:"
            f" a better one than {given['sgd_lr']:g} may bring SGD nearer to Adam."
        )
    return said


def measured(log: list[Line]) -> dict[str, float]:
    """What one run gives, all of it from the step with 1-bit weights.

    top1 and c2i are of the last epoch, so that nothing is chosen on the validation images;
    best_top1 is the best epoch's. flip_flop and revived are means over the epochs whose learning
    rate is not 0, and dead is of the last of these. In place of flip_flop there is
    flip_flop_sampled where a line does not say that all updates were counted.
    """
    lines = [line for line in log if line["stage"] == "step2"]
    if not lines:
        return {}
    values = {"top1": lines[-1]["val_top1"], "best_top1": max(line["val_top1"] for line in lines)}
    values |= _analysis(lines[-1:], ("c2i_half", "c2i_full", "saturation"))
    moving = [line for line in lines if line["lr"] > 0]
    values |= _analysis(moving, ("flip_flop", "revived")) | _analysis(moving[-1:], ("dead",))
    counted = all(
        "updates" in x["analysis"] for x in moving if "flip_flop" in x.get("analysis", {})
    )
    return values if counted else {SAMPLED if k == "flip_flop" else k: v for k, v in values.items()}


def _analysis(lines: list[Line], keys: Iterable[str]) -> dict[str, float]:
    """Means over the lines that know a quantity; a quantity that none knows is absent."""
    found = {}
    for key in keys:
        known = [line["analysis"][key] for line in lines if key in line.get("analysis", {})]
        if known:
            found[key] = mean(known)
    return found


def samples_flips(results: Results) -> bool:
    """Whether sampled flip-flop ratios are all that there is."""
    known = {quantity for runs in results.values() for run in runs.values() for quantity in run}
    return SAMPLED in known and "flip_flop" not in known


def values_of(variant: Variant, quantity: str, results: Results) -> list[float]:
    """A quantity of a row, seed by seed; of the runs that know it."""
    if quantity == "flip_flop" and samples_flips(results):
        quantity = SAMPLED
    runs = results.get(variant.name, {}).values()
    return [run[quantity] for run in runs if quantity in run]


def verdict(claim: Claim, results: Results) -> str:
    """Whether rows stand in the claimed order, by their means and by the ranges of their seeds.

    An order reproduces when no seed of a row reaches into the next row. It does not when a row that
    should be higher has all its seeds below those of a lower one. Else the seeds leave it open.
    """
    rows = [values_of(variant, claim.quantity, results) for variant in claim.rising]
    if not all(rows):
        return "cannot be told: runs are missing"
    rising = all(mean(low) < mean(high) for low, high in pairwise(rows))
    so = "so" if rising else "not so"
    if min(map(len, rows)) < 2:
        said = f"{so} in one seed, which decides nothing"
    elif all(max(low) < min(high) for low, high in pairwise(rows)):
        said = "reproduces at this scale"
    elif any(max(high) < min(low) for low, high in combinations(rows, 2)):
        said = "does not reproduce at this scale"
    else:
        said = f"{so} in the means, but the seeds overlap"
    sampled = claim.quantity == "flip_flop" and samples_flips(results)
    return f"{said} (by sampled updates)" if sampled else said


def verdicts(studies: Iterable[str], results: Results) -> list[str]:
    """A line of Markdown for each of the paper's orders."""
    claims = [claim for name in studies for claim in STUDIES[name].claims]
    return [f"- That {claim.text}: {verdict(claim, results)}." for claim in claims]


def markdown(
    studies: Iterable[str], results: Results, failed: dict[str, str], given: Settings
) -> str:
    """The tables beside the paper's numbers, and a sentence for each order.

    Args:
        studies: which.
        results: of their runs.
        failed: why runs failed, by folder.
        given: what was trained.
    """
    studies = list(studies)
    parts = [f"# Studies\n\n{scale(given)} {caution(given, studies)}\n\n{window(results)}\n"]
    for name in studies:
        parts += [_table(STUDIES[name], results), "\n".join(verdicts([name], results)) + "\n"]
    if failed:
        parts.append("## Failed runs\n\n" + "\n".join(f"- {k}: {v}" for k, v in failed.items()))
    return "\n".join(parts).rstrip() + "\n"


def window(results: Results) -> str:
    """What the numbers are of, in words."""
    return f"{WINDOW} {SAMPLES}" if samples_flips(results) else WINDOW


def heads(results: Results) -> list[str]:
    """Of the columns that :func:`cells` fills."""
    sampled = " (sampled)" if samples_flips(results) else ""
    return ["top-1, %", f"FF ratio{sampled}, 1e-3", "C2I (2p - 1)"]


def cells(variant: Variant, results: Results) -> list[str]:
    """Means and sample deviations over the seeds; empty where nobody knows one."""
    found = [(values_of(variant, key, results), factor) for key, factor in UNITS.items()]
    return [_cell([value * factor for value in values]) for values, factor in found]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{deviation}"


def _table(comparison: Comparison, results: Results) -> str:
    head = ["", "seeds", *heads(results), "paper: top-1, %", "FF, 1e-3"]
    rows = [head, ["---"] * len(head)]
    for variant in comparison.variants:
        row = [variant.title, str(len(results.get(variant.name, {}))), *cells(variant, results)]
        for quantity in ("top1", "flip_flop"):
            value = variant.published.get(quantity)
            row.append("" if value is None else f"{value * UNITS[quantity]:.4g}")
        rows.append(row)
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {comparison.title}\n\n{body}\n"
