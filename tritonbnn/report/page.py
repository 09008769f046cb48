"""The report: one HTML file with its pictures inside, which asks for nothing from outside."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

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
_TEXTS = 5  # columns; those after them hold numbers
_TEMPLATE = "page.html.jinja"


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
    rows = [_HEADS, *(_cells(run, stage) for run in runs for stage in run.stages.values())]
    lists = [_pairs(r, m.confused) for r, m in zip(runs, measured, strict=True) if m.confused]
    template = _environment().get_template(_TEMPLATE)
    return template.render(
        title=title,
        rows=rows,
        texts=_TEXTS,
        when=made.when.strftime("%Y-%m-%d %H:%M %z"),
        command=printable(made.command),
        notes=notes,
        pictures=[_shown(picture) for picture in pictures],
        confused=lists,
    )


def _environment() -> Environment:
    """Where names of runs and classes are text, whatever they hold, and a slip is an error."""
    return Environment(
        loader=PackageLoader("tritonbnn.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


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


def _shown(picture: Picture) -> dict[str, str | int]:
    """A picture at its natural size on the screen; a wide one scrolls."""
    width = int.from_bytes(picture.png[16:20])  # where a PNG file says so
    return {
        "title": picture.title,
        "reading": picture.reading,
        "width": width * _PIXELS // DPI,
        "data": base64.b64encode(picture.png).decode(),
    }


def _pairs(run: RunRecord, confused: Confused) -> dict[str, Any]:
    """What was confused most."""
    pairs = [
        {
            "label": confused.classes[pair.label],
            "guess": confused.classes[pair.guess],
            "images": pair.images,
            "of": pair.of,
        }
        for pair in most_confused(confused.counts, _PAIRS)
    ]
    return {"run": run.label, "stage": confused.stage, "pairs": pairs}
