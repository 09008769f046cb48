"""Peak resident memory of one CPU training step, beyond what imports and parameters take.

    python -m benchmarks.peak_memory --batch 8 --size 224

Ours and the obvious implementation each take their step in a process of their own.
"""

import json
import multiprocessing
import resource
import sys
from pathlib import Path

import torch

from benchmarks.machine import header
from benchmarks.rivals import parse
from benchmarks.steps import CLASSES, training_step
from tritonbnn import cli


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_of_step(name: str, batch: int, size: int) -> float:
    """MB (1e6 bytes) that one training step adds to the resident memory at its peak."""
    torch.manual_seed(0)
    rival = parse(name)
    model = rival.build("reactnet_a", 2, 1.0, CLASSES).to(memory_format=rival.memory_format)
    images = torch.randn(batch, 3, size, size).to(memory_format=rival.memory_format)
    step = training_step(model, images, torch.randint(CLASSES, (batch,)))
    before = resident_bytes()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / 1e6


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.peak_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    peaks = {}
    for name in ("obvious", "ours"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = round(pool.apply(peak_of_step, (name, args.batch, args.size)), 1)
    share = round(peaks["ours"] / peaks["obvious"], 3)
    for name, peak in peaks.items():
        print(f"{name:8s} {peak:8.1f} MB")
    print(f"ours takes {share:.3f} of the obvious implementation's")
    if args.json:
        result = header("python -m benchmarks.peak_memory " + " ".join(sys.argv[1:]))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result | {"mb": peaks, "share": share}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
