"""A CUDA graph's manners on a CPU: work is recorded as operators on fixed tensors, and repeated.

As on a GPU, recording does nothing, numbers of the host stay what they were, results are written to
where they were, and nothing may be read. What only a GPU has, such as streams, is left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero}


class Tape:
    """Stands in for :class:`tritonbnn.train.graphs.Graphs`.

    Attributes:
        warm: blocks that were done aside.
        repeated: how often each record was repeated, in the order of recording.
    """

    def __init__(self) -> None:
        self.warm = 0
        self.repeated: list[int] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.warm += 1
        yield

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        recorder = _Recorder()
        with recorder:
            work()
        recorder.undo()
        number = len(self.repeated)
        self.repeated.append(0)

        @torch.no_grad()
        def repeat() -> None:
            self.repeated[number] += 1
            for call in recorder.calls:
                _repeat(*call)

        return repeat


class _Recorder(TorchDispatchMode):
    """Notes every operator, and what was there before it of what it may change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in READING:
            raise RuntimeError(f"{func} reads a tensor, which no graph can")
        given = _tensors((args, kwargs))
        for tensor in given:  # not all operators say what they change: BatchNorm's does not
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        made = {t.untyped_storage().data_ptr() for t in _tensors(result)}
        self._own |= made - {t.untyped_storage().data_ptr() for t in given}
        self.calls.append((func, args, kwargs, result))  # keeps all memory, so that none is reused
        return result

    def undo(self) -> None:
        """Put back what recording has changed."""
        for storage, before in self._before.values():
            storage.copy_(before)


def _repeat(func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    again = func(*args, **kwargs)
    for old, new in zip(_tensors(result), _tensors(again), strict=True):
        if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
