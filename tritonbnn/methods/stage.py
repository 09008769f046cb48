"""What a stage of a run is, and what its method works with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonbnn.compute import Compute
from tritonbnn.data.sources import Source
from tritonbnn.distributed import World
from tritonbnn.settings import Choice, setting


@dataclass(frozen=True)
class Stage:
    """One leg of a run: its schedule, what it starts from, and how it learns.

    ``method``, ``optimizer`` and ``schedule`` are choices with settings of their own.
    """

    name: str
    method: Choice
    optimizer: Choice
    schedule: Choice
    epochs: int = setting(10, "passes over the training images", least=1)
    lr: float = setting(1.25e-3, "learning rate that the schedule multiplies", above=0)
    weight_decay: float = setting(0.0, "L2 term on convolution weights and shifts", least=0)
    binary_weights: bool = setting(True, "binarise the weights too, not the activations alone")
    start: str = setting(
        "", "an earlier stage, a run or a checkpoint to start from; empty: random weights"
    )
    published_top1: float = setting(
        0.0, "top-1 that a paper reports, shown beside ours; 0: none", least=0, most=100
    )


@dataclass(frozen=True, eq=False)
class Task:
    """What a method has to do, and what with.

    Attributes:
        stage: the stage that is trained.
        network: the arguments of ``build_model``, but for ``plan``.
        plan: what units save for backward.
        source: of the images; None for who trains by hand.
        compute: device and precision.
        world: the processes of the job.
    """

    stage: Stage
    network: Mapping[str, Any]
    plan: str
    source: Source | None
    compute: Compute
    world: World
