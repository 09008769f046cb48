"""A comparison in words: its table, what its seeds can tell, and a verdict for each order.

A result holds every seed's numbers. Means, deviations and verdicts are made from them anew whenever
they are shown, by this code alone.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from tritonbnn.compare.sets import QUANTITIES, Claim
from tritonbnn.compare.statistics import (
    LEVEL,
    MOST_SEEDS,
    POWER,
    Difference,
    Verdict,
    detectable,
    pooled,
    shared_level,
    verdict,
)

COLUMNS = (
    *("loss", "flip_flop", "flip_flop_sampled", "c2i_half"),
    *("saturation", "dead", "minutes"),
)
"""Beside the top-1 of each stage; loss only where nothing is classified."""

CELLS = (
    "A cell is a mean ± the sample deviation over seeds, of last epochs. All but top-1 and"
    " minutes is of the last stage. The FF ratio is the mean over its epochs in which weights move,"
    " so a shorter stage has the larger one. C2I is against the weights that it started from."
)
CAUTION = (
    "The paper's numbers are of ImageNet. Runs as small as these say nothing about ImageNet,"
    " whether they stand in its order or not."
)


@dataclass(frozen=True)
class Result:
    """What was compared, and every seed's numbers.

    Attributes:
        titles: of the sets.
        rows: title, recipe, model, width, batch_size, epochs by stage and published, by name.
        claims: orders; without any, every two rows are compared in top1.
        seeds: how many were asked for.
        values: numbers by row, seed and quantity. A run that failed is absent.
        failed: why runs failed, by their names.
    """

    titles: list[str]
    rows: dict[str, dict[str, Any]]
    claims: list[Claim]
    seeds: int
    values: dict[str, dict[str, dict[str, float]]]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Result":
        """From what :meth:`document` made, whatever else stands there."""
        keys = ("titles", "rows", "seeds", "values", "failed")
        claims = [
            Claim(claim["text"], claim["quantity"], tuple(claim["rising"]))
            for claim in document["claims"]
        ]
        return cls(claims=claims, **{key: document[key] for key in keys})

    def document(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def of_quantity(self, quantity: str) -> dict[str, list[float]]:
        """Numbers by row, seed by seed; of the runs that know it."""
        return {
            name: [run[quantity] for run in self.values.get(name, {}).values() if quantity in run]
            for name in self.rows
        }

    def verdicts(self) -> list[tuple[Claim, Verdict]]:
        """Of the claims, or of every two rows."""
        claims = self.claims or [
            Claim(f"{high} above {low}", "top1", (low, high))
            for low, high in combinations(self.rows, 2)
        ]
        level = self.level
        return [(c, verdict(c.rising, self.of_quantity(c.quantity), level)) for c in claims]

    @property
    def level(self) -> float:
        """Of each test."""
        return shared_level([c.rising for c in self.claims] or list(combinations(self.rows, 2)))

    @property
    def stages(self) -> list[str]:
        """Names of the stages of all rows."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row["epochs"]))


def summary(result: Result) -> dict[str, Any]:
    """Means, deviations and verdicts for a program. What cannot be told is null."""
    keys = dict.fromkeys(k for runs in result.values.values() for run in runs.values() for k in run)
    rows: dict[str, dict[str, Any]] = {name: {} for name in result.rows}
    for key in keys:
        for name, values in result.of_quantity(key).items():
            if values:
                deviation = stdev(values) if len(values) > 1 else None
                rows[name][key] = {"mean": mean(values), "sd": deviation, "seeds": len(values)}
    orders = [
        {
            "text": claim.text,
            "quantity": claim.quantity,
            "verdict": said.words,
            "steps": [_step(step) for step in said.steps],
        }
        for claim, said in result.verdicts()
    ]
    return {
        "rows": rows,
        "level": result.level,
        "detectable": _detectable(result),
        "orders": orders,
    }


def _step(step: Difference) -> dict[str, Any]:
    numbers = {k: v for k, v in asdict(step).items() if not (isinstance(v, float) and v != v)}
    said = {"seeds_needed": step.seeds_needed, "verdict": step.words}
    return {"margin": None, "deviation": None, **numbers, **said}


def _detectable(result: Result) -> dict[str, float] | None:
    deviation, freedom = pooled(list(result.of_quantity("top1").values()))
    if not freedom or not deviation or result.seeds < 2:
        return None
    found = detectable(deviation, result.seeds, result.level)
    return {"quantity": "top1", "deviation": deviation, "difference": found}  # type: ignore[dict-item]


def markdown(result: Result) -> str:
    """The whole page."""
    title = ", ".join(result.titles) or "Recipes side by side"
    said = f"{CELLS} {spread(result)} {caution(result)}".rstrip()
    parts = [f"# {title}", "\n".join(table(result)), said]
    parts += ["\n".join(orders(result))] if len(result.rows) > 1 else []
    if result.failed:
        lines = [f"- {name}: {reason}" for name, reason in result.failed.items()]
        parts.append("## Failed runs\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def table(result: Result, what: str = "") -> list[str]:
    """Lines of a Markdown table: mean ± sample deviation over the seeds.

    Args:
        result: whose.
        what: above the names of the rows.
    """
    tops = [(f"{name}.top1", f"{name}, top-1, %", 1.0) for name in result.stages]
    columns = [*tops, *((key, *QUANTITIES[key]) for key in COLUMNS)]
    known = {key: result.of_quantity(key) for key, *_ in columns}
    if any(result.of_quantity("top1").values()):
        known.pop("loss")
    columns = [column for column in columns if any(known.get(column[0], {}).values())]
    papers = [k for k in QUANTITIES if any(k in row["published"] for row in result.rows.values())]
    heads = [what, "seeds", "epochs", *(head for _, head, _ in columns)]
    heads += [f"paper: {QUANTITIES[key][0]}" for key in papers]
    lines = [heads, ["---"] * len(heads)]
    for name, row in result.rows.items():
        cells = [_title(name, row), str(len(result.values.get(name, {})))]
        cells.append(" + ".join(map(str, row["epochs"].values())))
        cells += [_cell([v * scale for v in known[key][name]]) for key, _, scale in columns]
        paper = [(row["published"].get(key), QUANTITIES[key][1]) for key in papers]
        cells += ["" if value is None else f"{value * scale:.4g}" for value, scale in paper]
        lines.append(cells)
    return [f"| {' | '.join(line)} |" for line in lines]


def _title(name: str, row: Mapping[str, Any]) -> str:
    title = str(row["title"]).replace("|", "\\|")
    return title if title == name else f"{name}: {title}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{deviation}"


def caution(result: Result) -> str:
    """What must not be concluded from a paper's numbers beside ours; nothing without any."""
    published = any(row["published"] for row in result.rows.values())
    return CAUTION if published else ""


def spread(result: Result) -> str:
    """What the numbers are, and how small a difference they can show."""
    found = _detectable(result)
    if result.seeds < 2:
        return "One seed shows no spread: it decides nothing. Take --seeds 3 or more."
    if found is None:
        return "The runs show no spread of top-1, so nothing can be said of differences."
    return (
        f"With {result.seeds} seeds and the spread seen, {found['deviation']:.2g} points of"
        f" top-1 pooled over all rows, a difference of {found['difference']:.2g} points is found"
        f" in {POWER:.0%} of such comparisons. Smaller ones mostly stay hidden."
    )


def orders(result: Result) -> list[str]:
    """A line for each order, and one for each difference that it stands on."""
    found = result.verdicts()
    lines = [
        f"Verdicts are two-sided t tests with the deviation pooled over two rows. All of them"
        f" together err with a chance of {LEVEL:.0%}, each with {result.level:.2g}.",
        "",
    ]
    for claim, said in found:
        if not result.claims and said.steps:  # every two rows: the difference says it all
            lines.append(f"- {_difference(said.steps[0], claim.quantity)}")
            continue
        text = claim.text[:1].upper() + claim.text[1:] if result.claims else claim.text
        lines.append(f"- {text}: {said.words}.")
        lines += [f"  - {_difference(step, claim.quantity)}" for step in said.steps]
    return lines


def _difference(step: Difference, quantity: str) -> str:
    head, scale = QUANTITIES[quantity]
    numbers = f"{head}: {step.high} minus {step.low} is {step.value * scale:.3g}"
    if math.isnan(step.margin):
        return f"{step.words} ({numbers})"
    numbers += f" ± {step.margin * scale:.2g}"
    if step.decided or not step.value or not step.deviation:
        return f"{step.words} ({numbers})"
    needed = step.seeds_needed or f"more than {MOST_SEEDS:,}"
    return f"{step.words} ({numbers}; {needed} seeds each would decide a difference of that size)"
