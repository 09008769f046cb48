"""Batches on their way to a GPU: each is copied while the GPU computes on the one before."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from tritonbnn.data.batches import MicroBatch

Batch = TypeVar("Batch", MicroBatch, tuple[Tensor, Tensor])
A = TypeVar("A")
B = TypeVar("B")


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches for a device. A GPU has each of them before it is asked for.

    Args:
        batches: images and labels, in page-locked memory for a GPU.
        device: a CPU gets its batches as they come.
    """
    if device.type != "cuda":
        return iter(batches)
    copies = _Copies(device)
    return one_ahead(batches, copies.send, copies.receive)


def one_ahead(items: Iterable[A], send: Callable[[A], B], receive: Callable[[B], A]) -> Iterator[A]:
    """All items in order, each sent before the one before it is handed out.

    An item that cannot be had raises only when it is asked for: what was sent before comes first.

    Args:
        items: what to hand out.
        send: begins to bring an item, and does not wait for it.
        receive: gives the item that was sent.
    """
    iterator = iter(items)
    sent: list[B] = []  # one at most
    while True:
        error, coming = None, []
        try:
            coming = [send(item) for item in islice(iterator, 1)]
        except Exception as caught:
            error = caught
        for item in sent:
            yield receive(item)
        if error is not None:
            raise error
        if not coming:
            return
        sent = coming


class _Copies:
    """Copies to a GPU, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Begin to copy; the event is when it is done."""
        with torch.cuda.stream(self._stream):
            copies = _moved(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
            return copies, self._stream.record_event()

    def receive(self, sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        """Have the current stream wait for the copy. The host does not."""
        batch, done = sent
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)

        def keep(tensor: Tensor) -> Tensor:
            """The stream of the copies may not reuse its memory before this one is done with it."""
            tensor.record_stream(current)
            return tensor

        return _moved(batch, keep)


def _moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, MicroBatch):
        return replace(batch, images=move(batch.images), labels=move(batch.labels))
    images, labels = batch
    return move(images), move(labels)
