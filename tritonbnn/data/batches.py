"""The order of the training images, their division over processes, and the loaders.

A *global batch* is what one optimiser step sees, over all processes and accumulation parts. It is
cut into one share per process, as equal as can be, and each share into *micro-batches*. Shares may
differ by one image; the mean over the global batch stays exact, because each micro-batch says how
many images are its own and how many the global batch has: the sum over processes and parts of
``loss_sum / global_count`` is the mean.

All of it is a function of seed, step, epoch and sizes. Nothing is drawn while training, so a run
can enter an epoch at any optimiser step.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tritonbnn.cli import UserError
from tritonbnn.data.sources import SampleKey, Source
from tritonbnn.data.workers import FETCHED_AHEAD, read_batches

_SHARED_MEMORY = Path("/dev/shm")  # on Linux


class Batched(Protocol):
    """Images that are read in batches."""

    def __len__(self) -> int: ...

    def batch(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) float32 and their labels (N,) int64."""

    def levels(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """The same, but uint8 and not normalised where they have 8 bits."""


@dataclass(eq=False)
class MicroBatch:
    """What one process takes in one forward and backward pass.

    Args:
        images: (N, C, H, W), at least one; float32, or uint8 that is not normalised yet.
        labels: (N,) int64.
        count: real images in it: N, or 0 where the one image is borrowed and must weigh nothing.
        global_count: images in the whole optimiser step.
        last: whether it ends the optimiser step.
    """

    images: Tensor
    labels: Tensor
    count: int
    global_count: int
    last: bool


@dataclass(frozen=True, eq=False)
class _Part:
    """A micro-batch before its images are read."""

    indices: np.ndarray
    count: int
    global_count: int
    last: bool


def epoch_order(seed: int, step: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of ``range(size)`` in which an epoch sees the training images."""
    return np.random.default_rng((seed, step, epoch)).permutation(size)


def train_steps(size: int, batch_size: int) -> int:
    """Optimiser steps of an epoch; the last one may be smaller."""
    return -(-size // batch_size)


def smallest_part(size: int, batch_size: int, accumulation: int = 1, world_size: int = 1) -> int:
    """Images of the smallest micro-batch of an epoch, as :func:`train_batches` cuts it."""
    batches = {min(batch_size, size), size % batch_size or batch_size}
    smallest = []
    for batch in batches:
        parts = min(accumulation, -(-batch // world_size))
        # where there is none, one is borrowed
        smallest.append(max(1, batch // world_size // parts))
    return min(smallest)


def check_fits_memory(source: Source, batch_size: int) -> None:
    """Refuse a batch whose images alone take more than all memory, before any of them is read.

    Raises:
        UserError: it does not fit.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    images = max(1, min(batch_size, max(len(source.train), len(source.val))))
    side = source.val.transform.size
    needed = images * source.channels * side * side * torch.float32.itemsize
    if needed > memory:
        raise UserError(
            f"{images} images of {side} x {side} take {needed / 1e9:.0f} GB, and this machine has"
            f" {memory / 1e9:.0f} GB: use a smaller --batch-size or --image-size"
        )


def check_shared_memory(
    source: Source, batch_size: int, workers: int, *, levels: bool = False
) -> None:
    """Refuse workers whose batches do not fit into shared memory, before any of them starts.

    Workers hand their batches over in ``/dev/shm``, and die of a bus error where it is full. Each
    may hold as many as the loader fetches ahead, and one more is on its way.

    Args:
        source: of the images.
        batch_size: images of a batch over all processes: a worker reads its process's share.
        workers: of each process.
        levels: whether 8-bit images stay so, see :func:`train_batches`.

    Raises:
        UserError: they do not fit.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    images = max(1, min(batch_size, max(len(source.train), len(source.val))))
    dtype = torch.uint8 if levels and source.train.transform.eight_bit else torch.float32
    batch = images * source.channels * source.val.transform.size**2 * dtype.itemsize
    needed = (FETCHED_AHEAD * workers + 1) * batch
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"the batches of {workers} workers take {needed / 1e6:.0f} MB of shared memory, and"
            f" {_SHARED_MEMORY} has {free / 1e6:.0f} MB: use fewer --workers or a smaller"
            " --batch-size, or make it larger (docker run --shm-size)"
        )


def train_batches(
    dataset: Batched,
    *,
    seed: int,
    step: int,
    epoch: int,
    batch_size: int,
    accumulation: int = 1,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    levels: bool = False,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of one epoch.

    Over all processes every image comes exactly once, and all processes get the same number of
    micro-batches in every optimiser step. Where a process would get none, it gets the first image
    of the global batch again, with ``count`` 0, so that its collectives match the others'.
    It passes through that process's batch norm all the same; process 0, whose statistics count,
    never gets one.

    Args:
        dataset: of the images.
        seed: the run's seed; with ``step`` and ``epoch`` it fixes the order.
        step: the training step, 1 or 2.
        epoch: counted from 0.
        batch_size: images of one optimiser step, over all processes and parts.
        accumulation: parts that a process's share is cut into; fewer in a last batch too small.
        start_batch: optimiser steps of this epoch already done; they are left out unread.
        rank: this process.
        world_size: number of processes.
        workers: reading processes; 0 reads in this one.
        pin_memory: put the images in page-locked memory.
        levels: leave 8-bit images for the device to normalise.

    Raises:
        UserError: An image is bad, or there are fewer images than processes.
    """
    size = len(dataset)
    _check_sizes(size, batch_size, world_size)
    order = epoch_order(seed, step, epoch, size)
    parts: list[_Part] = []
    for start in range(start_batch * batch_size, size, batch_size):
        parts += _cut(order[start : start + batch_size], accumulation, rank, world_size)
    reading = _Batches(dataset, epoch, levels)
    batches = _load(reading, [part.indices for part in parts], workers, pin_memory)
    for part, (images, labels) in zip(parts, batches, strict=True):
        yield MicroBatch(images, labels, part.count, part.global_count, part.last)


def val_batches(
    dataset: Batched,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    levels: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's (images, labels); over all processes each image comes exactly once.

    ``batch_size`` counts the images of all processes. They may get different numbers of batches, or
    none: no collective may be called between them.
    """
    indices = np.arange(len(dataset))
    blocks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    shares = [np.array_split(block, world_size)[rank] for block in blocks]
    reading = _Batches(dataset, 0, levels)
    yield from _load(reading, [s for s in shares if len(s)], workers, pin_memory)


def _check_sizes(size: int, batch_size: int, world_size: int) -> None:
    if size < world_size:
        raise UserError(f"{size} training images for {world_size} processes: start fewer processes")
    if batch_size < world_size:
        raise UserError(
            f"--batch-size {batch_size} counts the images of all {world_size} processes:"
            f" make it at least {world_size}, or start fewer processes"
        )


def _cut(batch: np.ndarray, accumulation: int, rank: int, world_size: int) -> list[_Part]:
    """One process's parts of a global batch."""
    shares = np.array_split(batch, world_size)
    # the first share is the largest: counted on it, every process has the same number of parts
    parts = np.array_split(shares[rank], min(accumulation, len(shares[0])))
    return [
        _Part(part if len(part) else batch[:1], len(part), len(batch), number == len(parts))
        for number, part in enumerate(parts, start=1)
    ]


def _load(
    reading: "_Batches", batches: list[np.ndarray], workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in read_batches(reading, batches, workers, pin_memory):
        if isinstance(batch, UserError):
            raise batch
        yield batch


@dataclass(frozen=True, eq=False)
class _Batches(Dataset):
    """A data set of whole batches. A user's mistake is handed over as a value.

    Raised in a worker, it would arrive wrapped in the worker's traceback.
    """

    dataset: Batched
    epoch: int
    levels: bool

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | UserError:
        read = self.dataset.levels if self.levels else self.dataset.batch
        try:
            return read([SampleKey(self.epoch, int(index)) for index in indices])
        except UserError as error:
            return error
