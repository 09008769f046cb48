"""One training step of ReActNet-A: ours against the obvious implementation, in one run.

    python -m benchmarks.train_step --batch 8 --size 224 --step 2 --rounds 5

Rounds alternate between the two, so that a change in the machine's load hits both. The ratio is
that of the medians. The megabytes saved for backward are slopes per image (see benchmarks.saved).
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baseline import ObviousReActNetA
from benchmarks.machine import header
from benchmarks.saved import saved_slope
from tritonbnn import cli
from tritonbnn.models import build_model

CLASSES = 1000


def ours(**options: int | float | bool) -> nn.Module:
    return build_model("reactnet_a", **options).to(memory_format=torch.channels_last)


IMPLEMENTATIONS: dict[str, Callable[..., nn.Module]] = {"obvious": ObviousReActNetA, "ours": ours}


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of ``model`` with Adam: forward, backward, update."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each callable in each of ``rounds`` rounds, after one round that is not timed."""
    for call in steps.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, call in steps.items():
            times[name].append(seconds(call))
    return times


def measure(batch: int, size: int, step: int, width: float, rounds: int, device: str) -> dict:
    """Time and saved bytes of both implementations on random images."""
    options = {"num_classes": CLASSES, "binary_weights": step == 2, "width": width}
    models = {name: build(**options).to(device) for name, build in IMPLEMENTATIONS.items()}
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    saved = {
        name: saved_slope(model, lambda n: torch.randn(n, 3, size, size, device=device))
        for name, model in models.items()
    }
    steps = {name: training_step(model, images, labels) for name, model in models.items()}
    times = interleaved(steps, rounds)
    rows = {
        name: {
            "seconds": [round(t, 4) for t in times[name]],
            "median_seconds": round(median(times[name]), 4),
            "saved_mb_per_image": round(saved[name].per_image, 2),
            "saved_mb_per_batch": round(saved[name].per_batch, 2),
        }
        for name in models
    }
    ratio = median(times["obvious"]) / median(times["ours"])
    return {"rows": rows, "times_faster": round(ratio, 3)}


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies all channels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    result = measure(args.batch, args.size, args.step, args.width, args.rounds, args.device)
    result = header("python -m benchmarks.train_step " + " ".join(sys.argv[1:])) | result
    for name, row in result["rows"].items():
        print(
            f"{name:8s} {row['median_seconds']:8.3f} s/step {row['saved_mb_per_image']:8.2f} MB/img"
            f" + {row['saved_mb_per_batch']:.2f} MB/batch saved for backward"
        )
    print(f"ours is {result['times_faster']:.2f} times as fast as the obvious implementation")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
