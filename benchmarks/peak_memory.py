"""Peak resident memory of CPU training steps, beyond what imports and parameters take.

    python -m benchmarks.peak_memory --batch 8 --size 224 --processes 5

Each process takes STEPS steps of one implementation, so gradients and Adam's state are counted.
What it had resident before, with the network and its images there and a tiny step taken to import
what torch imports late, is not.

glibc keeps some freed memory resident, and how much hangs on the order of sizes: the same code
peaked between 2.1 and 3.4 GB. So the numbers are taken with a fixed M_MMAP_THRESHOLD, with which
every tensor freed goes back to the system; those of malloc's defaults, and of memory that is kept
as the trainer has it, are given beside them.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from benchmarks.output import command
from benchmarks.rivals import Rival, parse
from benchmarks.steps import CLASSES, Step, training_step
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.provenance import header

IMPLEMENTATIONS = ("obvious", "ours")
STEPS = 3
MALLOCS = {
    "returning": {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)},
    "default": {},
    "keeping": {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"},
}


def resident_megabytes(line: str) -> float:
    """MB (1e6 bytes) of this process: VmRSS is resident now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(entry.split()[1] for entry in status if entry.startswith(line))
    return int(kilobytes) * 1024 / 1e6


def step_of(rival: Rival, batch: int, size: int, width: float) -> Step:
    """A training step of step 2 on random images."""
    model = rival.build("reactnet_a", 2, width, CLASSES).to(memory_format=rival.memory_format)
    images = torch.randn(batch, 3, size, size).to(memory_format=rival.memory_format)
    return training_step(model, images, torch.randint(CLASSES, (batch,)))


def peak_of_steps(name: str, batch: int, size: int, threads: int) -> float:
    """MB that training steps of an implementation add to the resident memory at their peak."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rival = parse(name)
    step_of(rival, 2, 32, 0.25)()
    step = step_of(rival, batch, size, 1.0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident_megabytes("VmRSS")
    for _ in range(STEPS):
        step()
    return resident_megabytes("VmHWM") - before


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


def in_fresh_process(name: str, batch: int, size: int, threads: int) -> float:
    """:func:`peak_of_steps` in a process of its own.

    Raises:
        cli.UserError: the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(peak_of_steps, name, batch, size, threads).result()
        except BrokenProcessPool as error:
            raise cli.UserError(
                f"the process of {name} was killed, most often for want of memory:"
                " choose a smaller --batch"
            ) from error


def measure(batch: int, size: int, threads: int, processes: int) -> dict:
    """Peaks of both implementations in fresh processes, for all ways of malloc."""
    result = {}
    for malloc, variables in MALLOCS.items():
        peaks: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(processes):
            for name, measured in peaks.items():
                with environment(variables):
                    peak = in_fresh_process(name, batch, size, threads)
                measured.append(round(peak, 1))
        result[malloc] = {
            "mb": {name: median(measured) for name, measured in peaks.items()},
            "share": round(median(peaks["ours"]) / median(peaks["obvious"]), 3),
            "largest_share": round(max(peaks["ours"]) / min(peaks["obvious"]), 3),
            "mb_by_process": peaks,
        }
    return {**result.pop("returning"), "with_malloc": result}


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.peak_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=3, help="of each implementation")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path = writable(args.json)
    if args.batch < 2 or args.size < 32 or args.size % 32:
        raise cli.UserError("BatchNorm needs --batch 2 or more, the network --size in 32s")
    if args.threads < 1 or args.processes < 1:
        raise cli.UserError("--threads and --processes must be at least 1")
    torch.set_num_threads(args.threads)  # for the header
    result = measure(args.batch, args.size, args.threads, args.processes)
    for malloc, row in {"returning": result, **result["with_malloc"]}.items():
        print(f"malloc: {malloc}")
        for name, peaks in row["mb_by_process"].items():
            print(f"  {name:8s} {median(peaks):8.1f} MB ({min(peaks)} to {max(peaks)})")
        print(
            f"  ours takes {row['share']:.3f} of the obvious implementation's,"
            f" at most {row['largest_share']:.3f}"
        )
    if path:
        write_json(path, header(command("peak_memory", argv)) | result)
    return 0


if __name__ == "__main__":
    cli.run(main)
