"""Watches the memory that kernels touch in Triton's interpreter, where a GPU would fault or race.

A launch may load and store only within the tensors that it was given. No two programs may touch
one element where one of them stores, as their order is not known on a GPU, and no two lanes of a
store may mean one element. The interpreter itself runs programs in order and reads whatever an
address holds, so that tests would pass.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

UNTOUCHED, SEVERAL = -1, -2


class Span:
    """Memory of one launch: a tensor, or several that overlap. Programs are noted for each byte.

    Attributes:
        start: address of the first byte.
        end: address behind the last.
        name: of the arguments that lie in it.
        stored: which program stored here.
        loaded: which program loaded from here, or SEVERAL.
    """

    def __init__(self, start: int, end: int, name: str) -> None:
        self.start, self.end, self.name = start, end, name
        self.stored = np.full(end - start, UNTOUCHED, np.int32)
        self.loaded = np.full(end - start, UNTOUCHED, np.int32)


class Accesses:
    """All loads and stores of one launch.

    Args:
        kernel: its name, for messages.
        tensors: what it was given, by the arguments' names.
    """

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel = kernel
        self.spans = [Span(*span) for span in _merged(sorted(_spans(tensors)))]
        self.starts = np.array([span.start for span in self.spans], np.int64)
        self.ends = np.array([span.end for span in self.spans], np.int64)
        self.programs: dict[tuple[int, ...], int] = {}

    def check(self, pointers: Any, mask: Any, stores: bool) -> None:
        """Raise AssertionError if an access of the current program is not one that it may make."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        index = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (index < 0) | (addresses + size > self.ends[index])
        if outside.any():
            self._fail(f"{'stores' if stores else 'loads'} {self._where(addresses[outside][0])}")
        index_of = interpreter.interpreter_builder.grid_idx
        program = self.programs.setdefault(tuple(index_of), len(self.programs))
        for number in np.unique(index):
            span = self.spans[number]
            places = addresses[index == number] - span.start
            (self._store if stores else self._load)(span, places, program)

    def _store(self, span: Span, places: np.ndarray, program: int) -> None:
        if len(np.unique(places)) < len(places):
            self._fail(f"stores twice at once to one element of {span.name}")
        for touched, how in ((span.stored[places], "stored"), (span.loaded[places], "loaded")):
            if ((touched != UNTOUCHED) & (touched != program)).any():
                self._fail(f"stores to an element of {span.name} that another program {how}")
        span.stored[places] = program

    def _load(self, span: Span, places: np.ndarray, program: int) -> None:
        stored, loaded = span.stored[places], span.loaded[places]
        if ((stored != UNTOUCHED) & (stored != program)).any():
            self._fail(f"loads an element of {span.name} that another program stored")
        alone = (loaded == UNTOUCHED) | (loaded == program)
        span.loaded[places] = np.where(alone, program, SEVERAL)

    def _where(self, address: int) -> str:
        """An address outside of all tensors, by the tensor before it or the first."""
        number = max(0, int(np.searchsorted(self.starts, address, "right")) - 1)
        if not self.spans:
            return "with no tensor given"
        span = self.spans[number]
        return f"outside: at byte {address - span.start} of {span.end - span.start} of {span.name}"

    def _fail(self, what: str) -> None:
        program = interpreter.interpreter_builder.grid_idx
        raise AssertionError(f"program {program} of {self.kernel} {what}")


def _spans(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[int, int, str]]:
    for name, x in tensors.items():
        if x.numel():
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            yield x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize, name


def _merged(spans: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Spans in order, those that overlap made one: a tensor may be given twice."""
    merged: list[tuple[int, int, str]] = []
    for start, end, name in spans:
        if merged and start < merged[-1][1]:
            first, last, names = merged.pop()
            start, end, name = first, max(last, end), f"{names}, {name}"
        merged.append((start, end, name))
    return merged


def watch(monkeypatch: Any) -> list[str]:
    """Check every access of all launches from now on; the list gets their kernels' names."""
    launched: list[str] = []
    current: list[Accesses] = []
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, call = executor._init_args_hst, executor.__call__

    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = prepare(self, args, kwargs)
        named = dict(zip(self.arg_names, on_host[0], strict=False)) | on_host[1]
        tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
        launched.append(self.fn.__name__)
        current.append(Accesses(self.fn.__name__, tensors))
        return on_host

    def called(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(self, *args, **kwargs)
        finally:
            current.clear()

    def loaded(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current[-1].check(pointers, mask, stores=False)
        return load(pointers, mask, *rest, **options)

    def stored(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current[-1].check(pointers, mask, stores=True)
        return store(pointers, value, mask, *rest, **options)

    monkeypatch.setattr(executor, "_init_args_hst", prepared)
    monkeypatch.setattr(executor, "__call__", called)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    return launched
