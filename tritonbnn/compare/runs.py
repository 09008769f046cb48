"""Training runs as child processes, and what their logs tell."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from tritonbnn.cli import UserError
from tritonbnn.compare.plan import Run
from tritonbnn.files import FolderLock, cannot_write
from tritonbnn.stop import EXIT_CODES, Stopped, StopSignals
from tritonbnn.train.checkpoint import with_stage
from tritonbnn.train.log import LOG, Line

_SECONDS = 30  # for the run of a comparison that was killed to save and end


def log_of(run: Run) -> list[Line]:
    """The lines of a run's log; none where it is not there or damaged: the trainer mends it."""
    try:
        lines = (run.folder / LOG).read_text("utf-8").splitlines()
        return [with_stage(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def is_finished(run: Run) -> bool:
    """Whether the log has every epoch of every stage."""
    told = {(line.get("stage"), line.get("epoch")) for line in log_of(run)}
    stages = run.config.chosen
    return told >= {(s.name, epoch) for s in stages for epoch in range(1, s.epochs + 1)}


def train(run: Run, signals: StopSignals) -> str:
    """Train, or go on.

    Args:
        run: what.
        signals: a request to stop goes on to the run.

    Returns:
        Why it failed; empty where it did not.

    Raises:
        Stopped: it was asked to stop, and has saved.
        UserError: what it says cannot be kept, or an earlier comparison's run goes on in its
            folder.
    """
    _wait_for_earlier(run.folder)
    said = run.folder.with_name(f"{run.name}.log")
    try:
        output = said.open("wb")
    except OSError as error:
        raise cannot_write(said, error) from error
    with output:
        code = _follow(run, output.fileno(), signals)
    if signals.number:
        raise Stopped(signals.number)
    if code == 0:
        return "" if is_finished(run) else f"its log does not tell of all epochs: see {said}"
    if code in EXIT_CODES.values():
        return f"somebody else stopped it (exit code {code}): run the same command again"
    return _reason(said, code)


def _follow(run: Run, output: int, signals: StopSignals) -> int:
    """Start the child, hand signals on to it, and wait for its end; the exit code."""
    command = [sys.executable, "-m", "tritonbnn.compare.child", run.row.module, *run.argv]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # which closes when this process ends
        stdout=output,
        stderr=output,
        # Ctrl-C would reach it twice, from the terminal and from here, and twice means at once
        start_new_session=True,
    )
    told = False
    while True:
        try:
            return process.wait(0.1)
        except subprocess.TimeoutExpired:
            if signals.number and not told:
                process.send_signal(signals.number)
                told = True


def _wait_for_earlier(folder: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while folder.is_dir() and os.access(folder, os.W_OK):
        try:
            FolderLock(folder).release()
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _reason(said: Path, code: int) -> str:
    """The error that the child told, or its last words."""
    lines = [x.strip() for x in said.read_text("utf-8", "replace").splitlines() if x.strip()]
    errors = [x.removeprefix("error: ") for x in lines if x.startswith("error: ")]
    if errors:
        return errors[-1]
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{killed}: see {said}" if not lines else f"{lines[-1]} ({killed}): see {said}"


def measured(log: Sequence[Line], stages: Sequence[str]) -> dict[str, float]:
    """The numbers of one run, in the units of its log.

    ``STAGE.top1`` is of the last epoch of a stage, so that nothing is chosen on the validation
    images. All else is of the last stage: top1, loss, c2i_half, c2i_full and saturation of its last
    epoch, and best_top1 of its best. flip_flop and revived are means over the epochs whose learning
    rate is not 0, and dead is of the last of these. minutes are of all stages.

    Args:
        log: of the run, finished.
        stages: names of those that were trained, in their order.
    """
    of = {name: [line for line in log if line["stage"] == name] for name in stages}
    values = {f"{name}.top1": lines[-1]["val_top1"] for name, lines in of.items()}
    last = of[stages[-1]]
    top1 = [line["val_top1"] for line in last if line["val_top1"] is not None]
    values |= {"top1": last[-1]["val_top1"], "best_top1": max(top1, default=None)}
    values["loss"] = last[-1]["val_loss"]
    values |= _analysis(last[-1:], ("c2i_half", "c2i_full", "saturation"))
    moving = [line for line in last if line["lr"] > 0]
    values |= _analysis(moving, ("flip_flop", "revived")) | _analysis(moving[-1:], ("dead",))
    values["minutes"] = sum(line["seconds"] for lines in of.values() for line in lines) / 60
    return {key: float(value) for key, value in values.items() if value is not None}


def _analysis(lines: Sequence[Line], keys: Iterable[str]) -> dict[str, float]:
    """Means over the lines that know a quantity; a quantity that none knows is absent."""
    known = {key: [a[key] for x in lines if key in (a := x.get("analysis", {}))] for key in keys}
    return {key: mean(values) for key, values in known.items() if values}
