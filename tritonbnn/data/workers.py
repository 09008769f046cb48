"""Processes that read images: they obey the trainer alone, and die where it can notice."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from tritonbnn.cli import UserError

FETCHED_AHEAD = 2  # batches a worker, torch's default

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHIELDED = hasattr(signal, "sigwaitinfo")  # not on macOS and Windows


def read_batches(
    dataset: Dataset, indices: list[np.ndarray], workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """``dataset[batch]`` for each batch of indices in order, read by workers that obey us alone.

    Args:
        dataset: gives a whole batch; a user's mistake as a value.
        indices: of each batch.
        workers: reading processes, of which no more start than there are batches; 0 reads in this
            one.
        pin_memory: put tensors in page-locked memory.

    Raises:
        UserError: a worker has died.
    """
    workers = min(workers, len(indices))
    loader = DataLoader(
        dataset,
        sampler=indices,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=FETCHED_AHEAD if workers else None,
        worker_init_fn=_obey_parent_alone if _SHIELDED else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    with _deaths_met_in_reading(workers):
        with _stop_signals_blocked():
            iterator = iter(loader)
        try:
            yield from iterator
        except (RuntimeError, EOFError, ConnectionError) as error:
            # it may die in the middle of handing a batch over, and the connection with it
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            other = "" if _forked() else ", or because the script that trains has no __main__ guard"
            raise UserError(
                "a process that reads images has died, most often because memory or shared memory"
                f" ran out{other}: use fewer --workers, and run the same command again"
            ) from error
        finally:
            del iterator  # ends the workers now; a traceback would keep them


def _forked() -> bool:
    """Whether workers are copies of this process. Others import the script that started it."""
    return multiprocessing.get_start_method() == "fork"


def _unchanged(batch: object) -> object:
    return batch


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Workers started here inherit the block, so that a Ctrl-C or a kill of the group spares them.

    The trainer decides when to stop, and needs batches until then.
    """
    if not _SHIELDED:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaths_met_in_reading(workers: int) -> Iterator[None]:
    """Let the death of a worker be noticed where its batch is waited for, and nowhere else.

    torch hears of it by a signal, and raises wherever its process is: in the middle of an optimiser
    step, which leaves nothing worth saving. Whoever waits for a batch looks after the workers too.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (workers and main and hasattr(signal, "SIGCHLD")):
        yield
        return
    signal_handling._set_SIGCHLD_handler()  # as its first loader would, and then no other does
    handler = signal.getsignal(signal.SIGCHLD)
    of_torch = getattr(handler, "__module__", "") == signal_handling.__name__
    if of_torch:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if of_torch:
            signal.signal(signal.SIGCHLD, handler)


def _obey_parent_alone(worker: int) -> None:
    """Let a worker end on a blocked stop signal only where the loader's own process sent it.

    It ends with that process too. Which one that is, multiprocessing knows: the parent that the
    system names is another one where a fork server starts the workers.
    """
    parent = multiprocessing.parent_process()
    assert parent
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)

    def obey() -> None:
        while signal.sigwaitinfo(_STOP_SIGNALS).si_pid != parent.pid:
            pass
        os._exit(0)

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    for work in (obey, follow):
        threading.Thread(target=work, daemon=True).start()
