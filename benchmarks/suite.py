"""The whole measurement in one command: tests, tuning, layers, training steps, training runs.

    make gpu                                     # or python3 -m benchmarks.suite
    make gpu ARGS="--minutes 12 --pack gpu.tar.gz"   # what fits into twelve minutes
    python -m benchmarks.suite --list
    python -m benchmarks.suite --only batch-sweep,report
    python -m benchmarks.suite --device cpu --figures   # what the README's table shows
    python -m benchmarks.suite --device cpu --tiny

Each part is a process of its own that is stopped after minutes. Results and logs land in
benchmarks/results/DEVICE. A part that ended well with the same code is not run again, so the same
command goes on where it stopped. A part that fails is named at the end.

--minutes ends the whole in time: a part that does not fit any more is left for the next run, and
smaller ones are tried. --pack puts the folder of results into one file.
"""

import argparse
import hashlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.output import read_result
from benchmarks.parts import MINUTES, Part, parts
from tritonbnn import cli
from tritonbnn.files import make_folder, writable, write_json
from tritonbnn.kernels.provenance import commit, folder_name, header

STATE = "suite.json"
DONE, LEFT_OUT = "done", "left out"
FAILED = 1
CPU_MINUTES = 20
"""After which a part is stopped on a CPU, where the speed of a machine is not known."""

LAST_SECONDS = 20
"""Of a limited time, for the report and the packing."""

GRACE_SECONDS = 60
"""Between asking a part to stop and ending it: a training run saves first."""


def fingerprint(*, tuned: bool) -> str:
    """A hash of the code that a result depends on, and of the tuning tables if it does."""
    files = [*ROOT.glob("tritonbnn/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    if tuned:
        files += ROOT.glob("tritonbnn/kernels/configs/*.json")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Suite:
    """The parts, and what is known of them from earlier runs.

    Args:
        folder: of the results, absolute or in the checkout.
        todo: the parts.
        limit: seconds after which a part is stopped.
        end: of all parts, on the clock of :func:`time.monotonic`.
    """

    def __init__(self, folder: Path, todo: list[Part], limit: float, end: float = math.inf) -> None:
        self.folder, self.todo, self.limit, self.end = folder, todo, limit, end
        self.state: dict[str, Any] = read_result(ROOT / folder / STATE) or {}

    def is_done(self, part: Part) -> bool:
        """Whether the part ended well with the same code, and its result is there."""
        if part.always:
            return False
        there = part.result is None or (ROOT / self.folder / part.result).exists()
        ended_well = {"exit_code": 0, "fingerprint": fingerprint(tuned=part.tuned)}
        return there and ended_well.items() <= self.state.get(part.name, {}).items()

    def run(self, part: Part) -> str:
        """Run a part, in several turns if it may; DONE, or why not."""
        if part.program and not shutil.which(part.program[0]):
            return f"{LEFT_OUT}: {part.program[0]} is not installed"
        if not part.always and 60 * part.minutes > self.left():
            return f"{LEFT_OUT} for the next run: {self.left() / 60:.1f} minutes are left"
        began, code_of_now = time.monotonic(), fingerprint(tuned=part.tuned)
        for turn in range(part.turns):
            print(f"  turn {turn + 1} of at most {part.turns}" if turn else "", flush=True)
            code = self._turn(part)
            if code not in (None, os.EX_TEMPFAIL):  # stopped, and it has saved
                break
        seconds = round(time.monotonic() - began, 1)
        self.state[part.name] = {
            "exit_code": code,
            "seconds": seconds,
            "commit": commit(),
            "fingerprint": code_of_now,
            "command": shlex.join(part.command),
        }
        write_json(ROOT / self.folder / STATE, self.state)
        if code is None:
            return f"stopped after {seconds / 60:.0f} minutes: run the same command again to go on"
        if code:
            return f"failed with exit code {code}: see {self.folder}/log/{part.name}.log"
        return DONE

    def left(self) -> float:
        """Seconds that parts may still take."""
        return max(0.0, self.end - time.monotonic())

    def _turn(self, part: Part) -> int | None:
        """One process; its exit code, or None if its time ran out."""
        command = [*part.program, sys.executable, "-m", *part.command]
        environ = {**os.environ, **part.environ, "PYTHONUNBUFFERED": "1"}
        make_folder(self._log(part).parent)
        with self._log(part).open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its own children can be stopped with it
            )
            copy = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
            copy.start()
            try:
                return process.wait(min(self.limit, max(self.left(), LAST_SECONDS)))
            except subprocess.TimeoutExpired:
                return None
            finally:
                _stop(process)
                copy.join(GRACE_SECONDS)

    def _log(self, part: Part) -> Path:
        return ROOT / self.folder / "log" / f"{part.name}.log"


def _copy(source: Any, log: Any) -> None:
    """Pass on what a part prints, to the terminal and to its log."""
    while chunk := source.read1(4096):
        for target in (sys.stdout.buffer, log):
            target.write(chunk)
            target.flush()


def _stop(process: subprocess.Popen) -> None:
    """End a part and its children, if there are any left: kindly first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_SECONDS
        signalled = number
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, signalled)
            except ProcessLookupError:
                return  # all have ended
            signalled = 0  # asks whether they have
            time.sleep(0.05)


def main(argv: list[str]) -> int:
    began = time.monotonic()
    args = _parser().parse_args(argv)
    there = args.device == "cpu" or torch.cuda.is_available()
    if not there and not args.dry_run:
        raise cli.UserError(
            "no CUDA device here: run make gpu on a machine that has one;"
            " to try the parts on a CPU: python -m benchmarks.suite --device cpu --tiny"
        )
    device = torch.device(args.device)
    name = folder_name(device) if there else "GPU"
    folder = args.out or Path("benchmarks", "results", f"tiny-{name}" if args.tiny else name)
    # a run of other code is not gone on with, nor read
    run = fingerprint(tuned=True) + (time.strftime("-%Y%m%d-%H%M%S") if args.fresh else "")
    runs = Path("runs", "suite", folder.name, run)
    everything = parts(
        folder, runs, cuda=device.type == "cuda", tiny=args.tiny, fashion=args.fashion
    )
    if args.figures:
        everything = [part for part in everything if part.figure]
    limit = args.part_minutes or (MINUTES if device.type == "cuda" else CPU_MINUTES)
    end = began + 60 * args.minutes - LAST_SECONDS if args.minutes else math.inf
    suite = Suite(folder, _chosen(everything, args.only), 60 * limit, end)
    todo = [part for part in suite.todo if args.fresh or not suite.is_done(part)]
    _announce(suite, todo, header("", device if there else torch.device("cpu")))
    if args.dry_run:
        return 0
    packed = writable(args.pack)
    make_folder(ROOT / folder)
    code = _run_all(suite, todo)
    if packed:
        pack(ROOT / folder, packed)
    return code


def pack(folder: Path, path: Path) -> None:
    """Put a folder of results into one file, as tar and gzip read it."""
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, folder.name)


def _chosen(everything: list[Part], only: str | None) -> list[Part]:
    if only is None:
        return everything
    known = {part.name: part for part in everything}
    unknown = [name for name in only.split(",") if name not in known]
    if unknown:
        raise cli.UserError(f"unknown part {unknown[0]!r}: choose from {', '.join(known)}")
    return [known[name] for name in only.split(",")]


def _announce(suite: Suite, todo: list[Part], head: dict[str, Any]) -> None:
    """What will be done, and how long it takes."""
    print(", ".join(f"{key} {head[key]}" for key in ("device", "torch", "triton", "commit")))
    for part in suite.todo:
        mark = f"about {part.minutes:g} min" if part in todo else "done before"
        print(f"  {part.name:24} {mark:14} {' '.join(part.command)}")
    minutes = sum(part.minutes for part in todo)
    print(f"{len(todo)} of {len(suite.todo)} parts, about {minutes:.0f} minutes: {suite.folder}")


def _run_all(suite: Suite, todo: list[Part]) -> int:
    """Run every part, whatever becomes of the others."""
    unfinished = {}
    for number, part in enumerate(todo, start=1):
        print(f"\n[{number}/{len(todo)}] {part.name}, about {part.minutes:g} min", flush=True)
        try:
            outcome = suite.run(part)
        except KeyboardInterrupt:
            print(f"stopped in {part.name}: run the same command again to go on")
            return cli.INTERRUPTED
        print(f"[{number}/{len(todo)}] {part.name}: {outcome}", flush=True)
        if outcome != DONE and not outcome.startswith(LEFT_OUT):
            unfinished[part.name] = outcome
    for name, outcome in unfinished.items():
        print(f"{name}: {outcome}", file=sys.stderr)
    return FAILED if unfinished else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m benchmarks.suite", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds, to try it")
    parser.add_argument("--only", help="these parts, parted by commas")
    parser.add_argument(
        "--figures", action="store_true", help="parts that the README's table shows"
    )
    parser.add_argument("--fresh", action="store_true", help="run finished parts again too")
    parser.add_argument("--dry-run", "--list", action="store_true", help="say what, and stop")
    limits = f"limit of a part; {MINUTES}, or {CPU_MINUTES} on a CPU"
    parser.add_argument("--part-minutes", type=cli.minutes, help=limits)
    parser.add_argument("--minutes", type=cli.minutes, help="limit of the whole")
    parser.add_argument("--pack", type=Path, help="put the folder of results into this file")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's files")
    return parser


if __name__ == "__main__":
    cli.run(main)
