"""Peak resident memory of CPU training steps, beyond what the process holds between them.

    python -m benchmarks.peak_memory --batch 8 --size 224 --processes 3
    python -m benchmarks.peak_memory --rivals ours,expert+compile --malloc all

Each process takes one step of one implementation, which compiles what it compiles. It then drops
the gradients and gives free memory back to the system. What is resident now is not counted:
imports, parameters, Adam's state, the compiler. The peak of the next STEPS steps beyond it is.

Malloc is as users have it. glibc keeps some freed memory resident, and how much hangs on the order
of sizes, so the processes of one implementation differ. ``--malloc all`` adds two other settings:
one that returns every freed tensor to the system at once, and one that keeps all, as the trainer
does.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.output import command
from benchmarks.rivals import chosen, parse
from benchmarks.steps import CLASSES, as_trainers_run, training_step
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header

RIVALS = "ours,ours-recompute,expert,expert+compile,twin,twin+compile,obvious"
STEPS = 3
BEYOND = "imports, parameters, Adam's state and the compiler"
DEFAULT = "default"
MALLOCS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    "returning": {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)},
    "keeping": {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"},
}


def resident_megabytes(line: str) -> float:
    """MB (1e6 bytes) of this process: VmRSS is resident now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(entry.split()[1] for entry in status if entry.startswith(line))
    return int(kilobytes) * 1024 / 1e6


def peak_of_steps(name: str, step: int, batch: int, size: int, threads: int) -> float:
    """MB that training steps of an implementation add to the resident memory at their peak."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rival = parse(name)
    model = rival.build("reactnet_a", step, num_classes=CLASSES)
    model = model.to(memory_format=rival.memory_format)
    images = torch.randn(batch, 3, size, size).to(memory_format=rival.memory_format)
    labels = torch.randint(CLASSES, (batch,))
    train = training_step(model, images, labels, bf16=rival.bf16, mode=rival.mode)
    with as_trainers_run():
        train()
        model.zero_grad()
        return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident_megabytes("VmRSS")
        for _ in range(STEPS):
            train()
    return resident_megabytes("VmHWM") - before


def return_free_memory() -> None:
    """Have glibc give the system what is free; another libc is left alone."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes that start meanwhile have these environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_fresh_process(name: str, step: int, batch: int, size: int, threads: int) -> float:
    """:func:`peak_of_steps` in a process of its own.

    Raises:
        cli.UserError: the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(peak_of_steps, name, step, batch, size, threads).result()
        except BrokenProcessPool as error:
            raise cli.UserError(
                f"the process of {name} was killed, most often for want of memory:"
                " choose a smaller --batch"
            ) from error


def measure(args: argparse.Namespace, names: list[str], mallocs: list[str]) -> dict[str, Any]:
    """Peaks of all implementations in fresh processes, which take turns, by the way of malloc."""
    result: dict[str, Any] = {}
    for malloc in mallocs:
        peaks: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.processes):
            for name, measured in peaks.items():
                with environment(MALLOCS[malloc]):
                    peak = in_fresh_process(name, args.step, args.batch, args.size, args.threads)
                measured.append(round(peak, 1))
        middle = {name: round(median(measured), 1) for name, measured in peaks.items()}
        result[malloc] = {"mb": middle, "mb_by_process": peaks}
    point = {"step": args.step, "batch": args.batch, "size": args.size}
    return {**point, "beyond": BEYOND, "with_malloc": result}


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.peak_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--rivals", default=RIVALS, help="parted by commas")
    parser.add_argument("--malloc", default=DEFAULT, choices=(*MALLOCS, "all"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=3, help="of each implementation")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path = writable(args.json)
    if args.batch < 2 or args.size < 32 or args.size % 32:
        raise cli.UserError("BatchNorm needs --batch 2 or more, the network --size in 32s")
    if args.threads < 1 or args.processes < 1:
        raise cli.UserError("--threads and --processes must be at least 1")
    names = list(chosen(args.rivals, torch.device("cpu"), "reactnet_a"))
    mallocs = list(MALLOCS) if args.malloc == "all" else [args.malloc]
    torch.set_num_threads(args.threads)  # for the header
    result = measure(args, names, mallocs)
    for malloc, row in result["with_malloc"].items():
        print(f"malloc: {malloc}")
        for name, peaks in row["mb_by_process"].items():
            print(f"  {name:24s} {median(peaks):8.1f} MB ({min(peaks)} to {max(peaks)})")
    if path:
        write_json(path, header(command("peak_memory", argv), torch.device("cpu")) | result)
    return 0


if __name__ == "__main__":
    cli.run(main)
