"""What a run tells: a bar for the eye, a JSON line per epoch, TensorBoard, and a table."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from tritonbnn.files import cannot_write, update
from tritonbnn.methods import Stage
from tritonbnn.train.config import MAY_CHANGE_ON_RESUME, Config
from tritonbnn.train.recipe import read_recipe, resolve

LOG, ANALYSIS = "log.jsonl", "analysis.safetensors"
Line = dict[str, Any]

logger = logging.getLogger(__name__)

_PUBLISHED_RECIPE, _PUBLISHED_CLASSES = "imagenet", 1000
# How a run may differ from that recipe, and still be compared with its numbers.
_IMMATERIAL = (
    *MAY_CHANGE_ON_RESUME,
    *("recipe", "seed", "accumulation", "channels_last", "compile", "sync_bn"),
)


def write_log(folder: Path, history: list[Line]) -> None:
    """Make ``log.jsonl`` say what ``history`` says.

    The checkpoint is the truth. Writing the whole file anew, a run that was cut off and goes on has
    no line twice and misses none.
    """
    text = "".join(json.dumps(line) + "\n" for line in history)
    update(folder / LOG, text.encode())


def write_analysis(folder: Path, rows: dict[str, Tensor]) -> None:
    """Make a stage's ``analysis.safetensors`` say what its recorder says, if that is anything."""
    if rows:
        update(folder / ANALYSIS, save(rows))


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a log line by TensorBoard's tag: analysis/KEY, and analysis/KEY/LAYER."""
    skipped = ("stage", "epoch", "analysis")
    named = {k: v for k, v in line.items() if k not in skipped and v is not None}
    record = line.get("analysis", {"layers": {}})
    named |= {f"analysis/{key}": value for key, value in record.items() if key != "layers"}
    for layer, values in record["layers"].items():
        named |= {f"analysis/{key}/{layer}": value for key, value in values.items()}
    return named


@cache
def _summary_writer() -> Any:
    """TensorBoard's writer, or None, with one line, where it cannot be had."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    # Packages that do not fit each other raise almost anything when they are imported. A run must
    # not end for a picture of it.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("no TensorBoard, which cannot be imported here: %s", reason)
        return None
    return SummaryWriter


class Board:
    """TensorBoard's view of one stage.

    Args:
        folder: of the run.
        stage: its name; each has a folder of its own, to be drawn over the others.
        epoch: the first epoch that is to come; events of an earlier attempt at it are hidden.
    """

    def __init__(self, folder: Path, stage: str, epoch: int) -> None:
        self._folder = folder / "tensorboard" / stage
        self._writer: Any = None
        writer_class = _summary_writer()
        if writer_class is None:
            return
        try:
            self._writer = writer_class(str(self._folder), purge_step=epoch + 1)
        except UnicodeEncodeError:
            logger.warning("%s is not UTF-8: TensorBoard cannot write there", self._folder)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def add(self, line: Line) -> None:
        """Draw one epoch."""
        if self._writer is None:
            return
        try:
            for tag, value in scalars(line).items():
                self._writer.add_scalar(tag, value, line["epoch"])
            self._writer.flush()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()


class Bar:
    """The progress of an epoch: a bar on a terminal, and elsewhere a line now and then.

    Args:
        title: what it is.
        steps: optimiser steps of the epoch.
        done: how many of them are done.
        show: whether this process talks.
        minutes: between lines where there is no terminal.
    """

    def __init__(
        self, title: str, steps: int, done: int, *, show: bool, minutes: float = math.inf
    ) -> None:
        self._title, self._steps, self._talks = title, steps, show
        self._pause, self._told_at = 60 * minutes, time.monotonic()
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=title,
            unit="step",
            leave=False,
            disable=None if show else True,
        )

    @property
    def due(self) -> bool:
        """Whether it is time for numbers. To have them takes a wait for the device."""
        late = time.monotonic() - self._told_at >= self._pause
        return not self._bar.disable or (self._talks and late)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def tell(self, done: int, seconds: float, sums: Sequence[float]) -> None:
        """Show numbers of the epoch so far.

        Args:
            done: optimiser steps.
            seconds: that they took.
            sums: of their images: loss, right answers and how many they are. Right answers are NaN
                where nothing is classified.
        """
        loss, right, images = sums
        top1 = "" if math.isnan(right) else f" top-1 {100 * right / images:.1f} %,"
        numbers = f"loss {loss / images:.3f},{top1} {images / seconds:.0f} img/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(numbers)
            return
        self._told_at = time.monotonic()
        left = tqdm.format_interval(round(seconds / done * (self._steps - done)))
        logger.info("%s: step %d/%d: %s, %s left", self._title, done, self._steps, numbers, left)

    def close(self) -> None:
        """Take it away."""
        self._bar.close()


def describe(line: Line, epochs: int) -> str:
    """One epoch in one line of text."""
    flips = "" if line["flips"] is None else f" {line['flips']:.2%} of signs flipped;"
    trained = f"loss {line['train_loss']:.4f}"
    if line["train_top1"] is not None:
        trained += f", top-1 {line['train_top1']:.2f} %"
    if line["val_top1"] is None:
        scored = f"loss {line['val_loss']:.4f}"
    else:
        scored = f"top-1 {line['val_top1']:.2f} %"
        if line["val_top5"] is not None:
            scored += f", top-5 {line['val_top5']:.2f} %"
    return (
        f"{line['stage']} epoch {line['epoch']}/{epochs}: {trained}; validation {scored};{flips}"
        f" {line['images_per_second']:.0f} img/s"
    )


def is_published(config: Config, classes: int) -> bool:
    """Whether a run is AdamBNN's, so that its published numbers are worth a look beside it."""
    recipe = resolve(read_recipe(_PUBLISHED_RECIPE))
    immaterial = {key: getattr(config, key) for key in _IMMATERIAL}
    same = dataclasses.replace(recipe, **immaterial) == config
    return same and classes == _PUBLISHED_CLASSES


def table(history: list[Line], stages: Sequence[Stage], *, published: bool) -> str:
    """The stages below each other, with what a paper reports beside them if wanted.

    Args:
        history: lines of the log.
        stages: of the run; one that has no line has no row.
        published: whether to show what the recipe says that its paper reports.
    """
    heads = ["stage", "weights", "epochs", "best top-1", "last top-1", "last top-5", "seconds"]
    rows = [heads + ["published"] * published]
    for stage in stages:
        lines = [line for line in history if line["stage"] == stage.name]
        if not lines:
            continue
        best = max((x["val_top1"] for x in lines if x["val_top1"] is not None), default=None)
        scores = (best, lines[-1]["val_top1"], lines[-1]["val_top5"])
        weights = "1-bit" if stage.binary_weights else "real"
        row = [stage.name, weights, str(len(lines)), *map(_percent, scores)]
        row += [f"{sum(line['seconds'] for line in lines):.0f}"]
        rows.append(row + [_percent(stage.published_top1 or None, 1)] * published)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f} %"
