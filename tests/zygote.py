"""A process that imports the package once, and forks copies of itself for every command.

It reads an order as a line of JSON and answers with one: for each process of the command its
``code`` (negative: the signal that ended it) and ``calls``, how many writes, fsyncs and renames it
made. An order may have a process meet its end at one of those calls, or at one of its optimiser
steps, or at one of the files that it lists, or have it killed after some time.
"""

import errno
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tritonbnn import cli
from tritonbnn.data import listing
from tritonbnn.train.keeper import Keeper

PATIENCE = 300  # seconds
WATCHED = ("write", "fsync", "replace")


class Faults:
    """Counts the calls that make a file last, and turns one of them, or a step, into a mishap.

    Args:
        mishap: "death", "full disk", "SIGTERM", "SIGINT", "SIGINT twice" or None.
        at_call: the call that meets it, from 1; 0 for none.
        at_step: the optimiser step of this process that meets it, from 1; 0 for none.
        at_file: the file that meets it as it is listed, from 1; 0 for none.
    """

    def __init__(self, mishap: str | None, at_call: int, at_step: int, at_file: int = 0) -> None:
        self.calls, self._steps, self._mishap = 0, 0, mishap
        self._at_call, self._at_step = (at_call, at_step) if mishap else (0, 0)
        for name in WATCHED:
            setattr(os, name, self._watched(name, getattr(os, name)))
        Keeper.after_step = self._stepping(Keeper.after_step)
        if mishap and at_file:
            self._files = iter(range(1, at_file + 1))
            listing.is_image = self._listing(listing.is_image, at_file)

    def _watched(self, name: str, real: Callable) -> Callable:
        def call(*arguments, **keywords):
            self.calls += 1
            if self.calls == self._at_call:
                if name == "write":  # part of it reaches the disk
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self._strike()
            return real(*arguments, **keywords)

        return call

    def _stepping(self, real: Callable) -> Callable:
        def after_step(keeper):
            self._steps += 1
            if self._steps == self._at_step:
                self._strike()
            real(keeper)

        return after_step

    def _listing(self, real: Callable, at_file: int) -> Callable:
        def is_image(path):
            if next(self._files, None) == at_file:
                self._strike()
            return real(path)

        return is_image

    def _strike(self) -> None:
        if self._mishap == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._mishap == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        name, _, twice = str(self._mishap).partition(" ")
        for _ in range(2 if twice else 1):
            os.kill(os.getpid(), signal.Signals[name])


def obey(order: dict, process: dict, calls_out: int) -> None:
    """Become a process of the command."""
    signal.alarm(PATIENCE)  # a command that hangs ends, and fails its test
    os.chdir(order["cwd"])
    sys.path.insert(0, order["cwd"])  # as python -m does
    redirect(process)
    # the parent of a test run may ignore them, and what is ignored stays so in children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.update(process["environ"])
    real_write = os.write
    faults = Faults(process["mishap"], order["at_call"], order["at_step"], order["at_file"])
    main = importlib.import_module(order["module"]).main
    sys.argv = [order["module"], *order["argv"], *process.get("argv", ())]
    code = 1
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    real_write(calls_out, str(faults.calls).encode())
    os._exit(code)


def redirect(process: dict) -> None:
    """Send stderr to the command's output file, and stdout to the same, or where it is asked to."""
    output = os.open(process["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if process["stdout"] == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif process["stdout"]:
        os.dup2(os.open(process["stdout"], os.O_WRONLY), 1)
    if encoding := process["environ"].get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding, errors="strict")


def start(order: dict, process: dict) -> tuple[int, int]:
    """Fork a process of the command; its id, and where it tells its calls."""
    calls_in, calls_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(calls_in)
        obey(order, process, calls_out)
    os.close(calls_out)
    return pid, calls_in


def wait(pid: int, deadline: float | None, kill_with: str) -> int:
    """The exit code of a child that may have to be killed, or asked to stop."""
    while deadline is not None and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if deadline is not None:
        os.kill(pid, signal.Signals[kill_with])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def carry_out(order: dict) -> list[dict]:
    """Run all processes of a command to their ends."""
    began = time.monotonic()
    deadline = None if order["kill_after"] is None else began + order["kill_after"]
    running = [start(order, process) for process in order["processes"]]
    answers = []
    for pid, calls_in in running:
        code = wait(pid, deadline, order["kill_with"])
        calls = int(os.read(calls_in, 100) or 0)
        os.close(calls_in)
        answers.append({"code": code, "calls": calls, "seconds": time.monotonic() - began})
    return answers


def serve(modules: list[str]) -> None:
    """Import, then fork for every line of input, until it ends."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # else a collection in a copy would touch, and so copy, all that is shared
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        answers.write(json.dumps(carry_out(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    serve(sys.argv[1:])
