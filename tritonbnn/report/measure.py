"""What only the network itself can tell: its loss landscape, and what it confuses."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from tritonbnn.analysis.landscape import Landscape, landscape
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.data.batches import val_batches
from tritonbnn.data.sources import EvalSet, SampleKey
from tritonbnn.report.confusion import Confused, confusion
from tritonbnn.report.read import RunRecord
from tritonbnn.train.checkpoint import BEST, stage_folder
from tritonbnn.train.log import Bar
from tritonbnn.train.weights import load_network, open_data

_BATCH = 128


@dataclass(frozen=True)
class Wanted:
    """What to measure, and on what.

    Attributes:
        points: of a landscape along each direction, odd; 0 for none.
        images: of the landscape's batch, at most.
        confusion: whether to count confusions.
        compute: device and precision.
        data_dir: where the data are now; None for where they were.
        workers: processes that read images.
    """

    points: int
    images: int
    confusion: bool
    compute: Compute
    data_dir: Path | None = None
    workers: int = 0


@dataclass(eq=False)
class Measured:
    """What was measured of a run.

    Attributes:
        landscapes: by stage.
        confused: of the furthest stage, or None.
    """

    landscapes: dict[str, Landscape] = field(default_factory=dict)
    confused: Confused | None = None


def measure(run: RunRecord, wanted: Wanted) -> Measured:
    """Measure the best checkpoint of each stage; what cannot be is a note in ``run.notes``."""
    measured = Measured()
    for stage in run.stages if wanted.points else ():
        try:
            measured.landscapes[stage] = _landscape(run, stage, wanted)
        except UserError as error:
            run.notes.append(f"no landscape of {stage} of {run.label}: {error}")
    if wanted.confusion:
        try:
            measured.confused = _confused(run, list(run.stages)[-1], wanted)
        except UserError as error:
            run.notes.append(f"no confusion matrix of {run.label}: {error}")
    return measured


def fixed_batch(images: EvalSet, count: int) -> tuple[Tensor, Tensor]:
    """Always the same random images, so that every class is among them, in their fixed view."""
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    return images.batch([SampleKey(0, int(index)) for index in np.sort(chosen)])


def _best(run: RunRecord, stage: str) -> Path:
    return stage_folder(run.path, stage) / BEST


def _landscape(run: RunRecord, stage: str, wanted: Wanted) -> Landscape:
    model, checkpoint = load_network(_best(run, stage))
    source = open_data(checkpoint, wanted.data_dir)
    batch = fixed_batch(replace(source.val, images=source.train.images), wanted.images)
    wanted.compute.place(model)
    bar = Bar(f"{run.label} {stage} landscape", wanted.points**2, 0, show=True)
    try:
        return landscape(
            model,
            *wanted.compute.to_device(*batch),
            points=wanted.points,
            after_point=bar.advance,
        )
    finally:
        bar.close()


def _confused(run: RunRecord, stage: str, wanted: Wanted) -> Confused:
    model, checkpoint = load_network(_best(run, stage))
    source = open_data(checkpoint, wanted.data_dir)
    wanted.compute.place(model)
    batches = val_batches(source.val, batch_size=_BATCH, workers=wanted.workers)
    counts = confusion(model, batches, wanted.compute, len(source.classes))
    return Confused(stage, list(source.classes), counts)
