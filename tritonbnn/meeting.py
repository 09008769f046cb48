"""Where the processes of a job find each other. All waiting here can be stopped by a signal.

torch would wait in C++, where Python hears no signal, and would tell nothing meanwhile.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from tritonbnn.cli import SettingError, UserError

logger = logging.getLogger(__name__)

VARIABLE = "TRITONBNN_JOIN_SECONDS"
_SECONDS = 600  # nodes of a cluster may start minutes apart
_QUIET = 1  # seconds of waiting that are not worth a line
_PAUSE = 0.1  # seconds between looks
_TRY = 10  # seconds for one attempt to connect
_NAMED = 8  # processes in a message
_LOOK = 0.02  # seconds between looks at what is there in a moment
_READ_SECONDS = 10  # in which all read what is there

T = TypeVar("T")


def attempt() -> int:
    """How often torchrun has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def meet(rank: int, size: int) -> dist.Store:
    """Wait until all processes of the job are there.

    Args:
        rank: of this process.
        size: how many they are.

    Returns:
        A store that all of them have.

    Raises:
        UserError: they do not come in time, or something else is in the way.
    """
    waiting = _Waiting(rank, size)
    # torchrun has a store of its own
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    leads = rank == 0 and not of_agent
    store = _host(waiting, size) if leads else _reach(waiting, size, shared=not of_agent)
    # A restart by torchrun may meet the store of the attempt before, in which gloo would find the
    # addresses of processes that are dead. So each attempt has keys of its own.
    own = dist.PrefixStore(f"tritonbnn/attempt_{attempt()}", store)
    try:
        _gather(own, waiting, check_twice=not of_agent)
    except dist.DistError as error:
        raise UserError(
            f"process 0 at {waiting.place} has left: see what it says, and start all again"
        ) from error
    own.set_timeout(timedelta(seconds=_SECONDS))
    return own


def exchange(store: dist.Store, name: str, rank: int, size: int, text: str) -> list[str]:
    """The texts of all processes, by rank. A signal ends the wait for them.

    There is no limit to it, as nobody knows how long a process reads its data.

    Args:
        store: from :func:`meet`.
        name: of the exchange; no two may have the same.
        rank: of this process.
        size: how many processes they are.
        text: of this process.

    Raises:
        UserError: process 0 has left.
    """
    keys = [f"{name}/{number}" for number in range(size)]
    began, told = time.monotonic(), False
    try:
        store.set(keys[rank], text)
        while not store.check(keys):
            if not told and time.monotonic() - began > _QUIET:
                told = True
                late = [str(number) for number, key in enumerate(keys) if not store.check([key])]
                logger.info("waiting for process %s, which is not as far", ", ".join(late[:_NAMED]))
            time.sleep(_LOOK)
        texts = [store.get(key).decode() for key in keys]
        readers = store.add(f"{name}/read", 1)
        # with process 0 the store would go, before others have read
        until = time.monotonic() + _READ_SECONDS
        while rank == 0 and readers < size and time.monotonic() < until:
            time.sleep(_LOOK)
            readers = store.add(f"{name}/read", 0)
    except dist.DistError as error:
        raise UserError("process 0 has left: see what it says, and start all again") from error
    return texts


class _Waiting:
    """How long this process has waited, and whether it has said so."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.place = f"{self.host}:{self.port}"
        self._began, self._limit, self._told = time.monotonic(), _limit(), False

    @property
    def left(self) -> float:
        """Seconds."""
        return self._began + self._limit - time.monotonic()

    def go_on(self, describe: Callable[[], str]) -> None:
        """Wait a little more.

        Args:
            describe: says what is waited for.

        Raises:
            UserError: it took too long.
        """
        if self.left < 0:
            raise UserError(
                f"{describe()}, for {self._limit} seconds in vain: see that all were started with"
                f" the same MASTER_ADDR and MASTER_PORT, or set {VARIABLE} higher"
            )
        if not self._told and self._limit - self.left > _QUIET:
            self._told = True
            logger.info("%s", describe())
        time.sleep(_PAUSE)


def _limit() -> int:
    text = os.environ.get(VARIABLE) or str(_SECONDS)
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise SettingError(f"{VARIABLE} must be a whole number of seconds, not {text!r}")
    return int(text)


def _host(waiting: _Waiting, size: int) -> dist.Store:
    """The store, in this process."""
    try:
        # by way of this machine itself: whether others reach it by MASTER_ADDR, they will see
        return _open("127.0.0.1", waiting, size, is_master=True, multi_tenant=True)
    except (dist.DistError, TimeoutError) as error:
        raise UserError(
            f"process 0 cannot listen at {waiting.place}, most often because the port is in use:"
            " choose another MASTER_PORT (--master-port of torchrun)"
        ) from error


def _reach(waiting: _Waiting, size: int, *, shared: bool) -> dist.Store:
    """The store in process 0, or in torchrun."""
    reason = ""

    def describe() -> str:
        return f"process {waiting.rank} waits for process 0 at {waiting.place} ({reason})"

    def knock() -> None:
        socket.create_connection((waiting.host, waiting.port), _TRY).close()

    while True:
        try:
            _stoppable(knock, waiting.left)  # torch's own attempts would fill the screen
            break
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
        waiting.go_on(describe)
    try:
        return _open(waiting.host, waiting, size, is_master=False, multi_tenant=shared)
    except (dist.DistError, TimeoutError) as error:
        raise UserError(
            f"what listens at {waiting.place} is not process 0 of a job: choose another MASTER_PORT"
            " (--master-port of torchrun)"
        ) from error


def _open(host: str, waiting: _Waiting, size: int, **options: bool) -> dist.Store:
    """A store. To a stranger that listens and says nothing torch itself would wait for ever."""
    return _stoppable(
        lambda: dist.TCPStore(
            host,
            waiting.port,
            size,
            timeout=timedelta(seconds=_TRY),
            wait_for_workers=False,
            **options,
        ),
        _TRY,
    )


def _gather(store: dist.Store, waiting: _Waiting, *, check_twice: bool) -> None:
    """Tell the others that this process is there, and wait for them."""
    here = [f"here/{rank}" for rank in range(waiting.size)]
    if store.add(here[waiting.rank], 1) > 1 and check_twice:
        raise UserError(
            f"two processes have RANK {waiting.rank} at {waiting.place}: give each its own, or"
            " choose another MASTER_PORT for another job"
        )

    def missing() -> str:
        ranks = [str(rank) for rank, key in enumerate(here) if not store.check([key])]
        more = ", ..." if len(ranks) > _NAMED else ""
        return (
            f"waiting for {len(ranks)} of {waiting.size} processes at {waiting.place}"
            f" (RANK {', '.join(ranks[:_NAMED])}{more})"
        )

    # process 0 looks after all, and the others after one word of it
    if waiting.rank == 0:
        while not store.check(here):
            waiting.go_on(missing)
        store.set("all", "")
    while not store.check(["all"]):
        waiting.go_on(missing)


def _stoppable(work: Callable[[], T], seconds: float) -> T:
    """``work()`` in a thread that a signal, or the end of the time, leaves behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(max(seconds, 0))
