"""The loop: train for one epoch. Nothing in it waits for the device."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritonbnn.cli import UserError
from tritonbnn.data.batches import MicroBatch, smallest_part
from tritonbnn.data.sources import Source
from tritonbnn.distributed import World
from tritonbnn.train.checkpoint import State
from tritonbnn.train.config import MOST_IMAGES, Config

Step = Callable[[State, nn.Module, list[MicroBatch], "FirstBad"], None]
"""Takes an optimiser step, see :func:`take_step`."""


class FirstBad:
    """The first optimiser step whose loss was not finite, noted without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, loss: Tensor, index: int | Tensor) -> None:
        """Look at the loss of optimiser step ``index``."""
        fresh = (self._index < 0) & ~torch.isfinite(loss.detach())
        self._index.copy_(torch.where(fresh, index, self._index))

    def read(self) -> int | None:
        """Its index, or None. Waits for the device."""
        index = int(self._index)
        return None if index < 0 else index


def check_parts(model: nn.Module, source: Source, config: Config, world: World) -> None:
    """Refuse a batch size that leaves a part of one image, where the network needs two.

    BatchNorm cannot train where one pixel is left of one image: a single value has no variance.

    Args:
        model: the network, on the CPU.
        source: of the images.
        config: of the run.
        world: the processes of the job.

    Raises:
        UserError: naming a batch size that can be.
    """

    size = len(source.train)

    def smallest(batch_size: int) -> int:
        return smallest_part(size, batch_size, config.accumulation, world.size)

    shared = config.sync_bn and world.size > 1
    if (
        shared
        or smallest(config.batch_size) > 1
        or _trains_on_one(model, source.channels, config.image_size)
    ):
        return
    most = min(size, MOST_IMAGES)
    near = sorted(range(world.size, most + 1), key=lambda b: (abs(b - config.batch_size), b))
    good = next((b for b in near if smallest(b) > 1), None)
    raise UserError(
        f"{size} training images in batches of {config.batch_size} leave a part of one image, and"
        f" the network needs two, as it makes one pixel of {config.image_size} x"
        f" {config.image_size}: use"
        + (f" --batch-size {good}" if good else " more images, fewer processes or fewer parts")
    )


@torch.no_grad()
def _trains_on_one(model: nn.Module, channels: int, side: int) -> bool:
    trial = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng(devices=[]):
            trial(torch.zeros(1, channels, side, side))
    except ValueError:
        return False
    return True


def take_step(state: State, network: nn.Module, parts: list[MicroBatch], bad: FirstBad) -> None:
    """Take an optimiser step.

    Args:
        state: its weights and counts move on.
        network: ``state.model``, wrapped where there are several processes.
        parts: of the batch.
        bad: notes a loss that is not finite.
    """
    with state.method.passes(state.model, state.optimizer):
        for part in parts:
            forward_and_backward(state, network, part, bad, state.batch)
    state.scaler.unscale_(state.optimizer)
    update(state, lambda: state.scaler.step(state.optimizer))
    state.scaler.update()
    state.optimizer.zero_grad()


def forward_and_backward(
    state: State, network: nn.Module, part: MicroBatch, bad: FirstBad, index: int | Tensor
) -> None:
    """Add a part's share to the gradients, and count its images; ``index`` is the step's."""
    task = state.method.task
    images, labels = task.compute.to_device(part.images, part.labels)
    with _gradient_exchange(network, part.last):
        found = state.method.losses(network, replace(part, images=images, labels=labels))
        # The gradient is the mean over the images of all parts and processes. Each part gives its
        # share of that mean; one borrowed to fill a part up is left out.
        loss = found.each[: part.count].sum() / part.global_count
        # DistributedDataParallel divides by the number of processes, so that is multiplied back
        total = loss * task.world.size
        if part.last:  # a penalty counts once in a step, and in each process alike
            total = total + found.extra
        state.scaler.scale(total).backward()
    bad.note(total, index)
    own = slice(part.count)
    logits = None if found.logits is None else found.logits[own]
    state.meter.add(found.each[own], logits, labels[own])


def update(state: State, step: Callable[[], object]) -> None:
    """Update the weights. Flips are counted, and gradients looked at if it is time.

    Args:
        state: its gradients are whole, and not scaled.
        step: the optimiser's own.
    """
    looking = state.analysis.due(state.batch)
    if looking:  # before the method changes them: the gradients of the loss are meant
        state.analysis.before_update()
    state.method.before_update(state.model)
    step()
    state.method.after_update(state.model)
    state.analysis.after_update(looked=looking)


def _gradient_exchange(network: nn.Module, last: bool) -> AbstractContextManager:
    """Between processes gradients are exchanged once an optimiser step, in its last part."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def train_one_epoch(
    state: State,
    network: nn.Module,
    batches: Iterable[MicroBatch],
    bad: FirstBad,
    *,
    after_step: Callable[[], Any],
    watch: Callable[[Iterable[list[MicroBatch]]], Iterable[list[MicroBatch]]] = iter,
    take: Step = take_step,
) -> None:
    """Train to the end of the epoch, from wherever in it ``state`` is.

    Args:
        state: moves on, batch by batch.
        network: ``state.model``, wrapped where there are several processes.
        batches: the rest of this epoch.
        bad: notes the first loss that is not finite, by the optimiser step within the epoch.
        after_step: called when an optimiser step is done; may raise to leave.
        watch: hands on the parts of each optimiser step, between two of which ``state`` is whole.
        take: takes an optimiser step, as :func:`take_step` does.
    """
    network.train()
    for parts in watch(optimiser_steps(batches)):
        take(state, network, parts, bad)
        state.batch += 1
        after_step()


def optimiser_steps(batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """The parts of each optimiser step.

    All are read before the first is computed: an image that cannot be read then leaves no step half
    done.
    """
    parts: list[MicroBatch] = []
    for part in batches:
        parts.append(part)
        if part.last:
            yield parts
            parts = []
