"""The report: one HTML file with its pictures inside, which asks for nothing from outside."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

import numpy as np

from tritonbnn.cli import printable
from tritonbnn.report.catalogue import CATALOGUE, Picture
from tritonbnn.report.confusion import Confused, most_confused
from tritonbnn.report.measure import Measured
from tritonbnn.report.read import RunRecord, StageRecord
from tritonbnn.report.style import DPI

_PAIRS = 10  # in a list of confusions
_PIXELS = 100  # of the screen, for an inch of a picture
_HEADS = ["run", "recipe", "model", "stage", "weights", "width", "seed", "lr", "decay", "epochs"]
_HEADS += ["best top-1, %", "last top-1, %", "seconds"]
_NUMBERS = 5  # columns from here on hold numbers


def compare(runs: Sequence[RunRecord]) -> list[str]:
    """What keeps runs from being compared with the first of them, a sentence each."""
    first, notes = runs[0], []
    for run in runs[1:]:
        network, data = _differing(first.network, run.network), _differing(first.data, run.data)
        if network:
            notes.append(
                f"{run.label} is another network than {first.label} ({network}):"
                " compare their curves; a layer of one has no counterpart in the other"
            )
        if data:
            notes.append(
                f"{run.label} has other data than {first.label} ({data}):"
                " their losses and top-1 do not compare"
            )
    return notes


def _differing(first: dict[str, object], other: dict[str, object]) -> str:
    keys = [key for key in first if first[key] != other[key]]
    return ", ".join(f"{key} {other[key]!r} and not {first[key]!r}" for key in keys)


@dataclass(frozen=True)
class Made:
    """When a page was made, and by which command."""

    when: datetime
    command: str


def page(
    runs: Sequence[RunRecord],
    measured: Sequence[Measured],
    pictures: Sequence[Picture],
    made: Made,
) -> str:
    """The report as HTML."""
    title = f"tritonbnn: {', '.join(run.label for run in runs)}"
    notes = compare(runs) + [note for run in runs for note in run.notes]
    drawn = {picture.name for picture in pictures}
    if any(m.confused for m in measured):  # of many classes there is a list and no picture
        drawn.add("confusion")
    empty = [title for name, title, *_ in CATALOGUE if name not in drawn]
    if empty:
        notes.append(
            f"nothing to draw for: {', '.join(empty)}; a run trained with --analysis full, with its"
            " checkpoints and its data in place, has all"
        )
    when = made.when.strftime("%Y-%m-%d %H:%M %z")
    parts = [f"<h1>{escape(title)}</h1>", _table(runs)]
    parts.append(f'<p class="made">{when}: <code>{escape(printable(made.command))}</code></p>')
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f"<h2>What is missing</h2>\n<ul>{items}</ul>")
    parts += [_figure(picture) for picture in pictures]
    parts += [_pairs(run, m.confused) for run, m in zip(runs, measured, strict=True) if m.confused]
    body = "\n".join(parts)
    return _PAGE.format(title=escape(title), style=_CSS, body=body)


_CSS = """
body { margin: 2em auto; max-width: 70em; padding: 0 1em; font: 16px/1.5 sans-serif; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: .25em .8em; text-align: left; white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
figure { margin: 0 } figcaption { max-width: 50em }
h2 { margin-top: 2em }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table(runs: Sequence[RunRecord]) -> str:
    head = _row(_HEADS, "th")
    body = "\n".join(_row(_cells(run, stage)) for run in runs for stage in run.stages.values())
    return f'<div class="wide"><table>\n{head}\n{body}\n</table></div>'


def _cells(run: RunRecord, stage: StageRecord) -> list[str]:
    """One row of the table: a stage of a run."""
    top1, seconds = stage.series("val_top1"), stage.series("seconds")
    known = [run.setting(key, stage.name) for key in ("recipe", "model")]
    numbers = [run.setting(key, stage.name) for key in ("width", "seed", "lr", "weight_decay")]
    scores = [_two_digits(np.fmax.reduce(top1)), _two_digits(top1[-1]), f"{np.nansum(seconds):.0f}"]
    row = [run.label, *known, stage.name, stage.weights, *numbers, stage.epochs, *scores]
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in row]


def _two_digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    kinds = [' class="number"' if index >= _NUMBERS else "" for index in range(len(cells))]
    inner = "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
    return f"<tr>{inner}</tr>"


def _figure(picture: Picture) -> str:
    """A picture at its natural size on the screen; a wide one scrolls."""
    data = base64.b64encode(picture.png).decode()
    width = int.from_bytes(picture.png[16:20])  # where a PNG file says so
    return (
        f"<h2>{escape(picture.title)}</h2>\n<figure>"
        f'<div class="wide"><img alt="{escape(picture.title)}" width="{width * _PIXELS // DPI}"'
        f' src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{escape(picture.reading)}</figcaption></figure>"
    )


def _pairs(run: RunRecord, confused: Confused) -> str:
    """What was confused most, in words."""
    heading = f"<h2>Most confused: {escape(run.label)}, {confused.stage}</h2>"
    pairs = most_confused(confused.counts, _PAIRS)
    if not pairs:
        return f"{heading}\n<p>Nothing: every image was recognised.</p>"
    items = "".join(
        f"<li>{escape(confused.classes[p.label])}, taken for {escape(confused.classes[p.guess])}:"
        f" {p.images} of {p.of} images</li>"
        for p in pairs
    )
    return f"{heading}\n<ul>{items}</ul>"
