"""A packed ReActNet-A on a GPU, beside the networks that torch runs.

    python -m benchmarks.deploy_gpu
    python -m benchmarks.deploy_gpu --batch 1 256 --rivals expert+bf16+channels_last+compile

    python -m benchmarks.deploy_gpu --count sm_90     # launches and bytes, without a GPU

Rivals take turns in one process, from an idle device to an idle device, and numbers are medians.
All answer images that are on the device already. The packed network does it in two precisions of
its stream. The others are those of benchmarks.train_step, in eval mode.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rounds
from benchmarks.launches import call_launches, in_channels_last
from benchmarks.output import command
from benchmarks.rivals import Rival, parse
from benchmarks.steps import as_trainers_run
from tritonbnn import cli
from tritonbnn.compute import PRECISIONS, choose_device
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.gpu import GpuEngine, GpuNetwork
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header
from tritonbnn.kernels.targets import Target, parse_target
from tritonbnn.models import build_model

MODEL = "reactnet_a"
BATCHES = (1, 32, 256)
RIVALS = (
    *("ours+bf16", "expert+bf16+channels_last", "expert+bf16+channels_last+compile"),
    *("twin+bf16+channels_last", "twin+bf16+channels_last+compile"),
)
CALLS = 20
"""Of a turn: on a GPU they take a tenth of a second or so."""

Call = Callable[[], Tensor]


def packed_call(precision: str, images: Tensor, width: float) -> Call:
    """The packed network's answer to the images, under a graph where there is a GPU."""
    packed = fold(build_model(MODEL, width=width).eval())
    engine = GpuEngine(packed, images.device, precision)
    for _ in range(2):  # the second is captured
        engine(images)
    return lambda: engine(images)


def torch_call(rival: Rival, images: Tensor, width: float) -> Call:
    """A network's answer, as torch runs it."""
    model: nn.Module = rival.build(MODEL, 2, width=width).eval().to(images.device)
    model.to(memory_format=rival.memory_format)  # type: ignore[call-overload]
    if rival.mode:
        model.compile(mode=rival.mode, dynamic=False)
    images = images.to(memory_format=rival.memory_format)

    def call() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rival.bf16):
            return model(images)

    return call


def counted(target: Target, batch: int, size: int, width: float) -> dict[str, dict[str, Any]]:
    """Launches of a call in bf16, and MB an image that they read and write: packed, and as torch.

    Images come as the stream's numbers.
    """

    def images() -> Tensor:
        empty = torch.empty(batch, 3, size, size, dtype=torch.bfloat16)
        return empty.contiguous(memory_format=torch.channels_last)

    folded = fold(build_model(MODEL, width=width).eval())
    network = GpuNetwork(folded, torch.device("cpu"), torch.bfloat16)

    def packed() -> Call:
        return partial(network.logits, images())

    def ours() -> Call:
        model = in_channels_last(parse("ours").build(MODEL, 2, width=width)).eval()

        def call() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(images())

        return call

    rows = {}
    for name, make in (("packed, bf16", packed), ("ours+bf16", ours)):
        found = call_launches(make, target)
        megabytes = sum(launch.bytes for launch in found) / batch / 1e6
        kernels = Counter(launch.name for launch in found)
        rows[name] = {"launches": len(found), "mb_per_image": megabytes, "kernels": dict(kernels)}
    return rows


def race(calls: Mapping[str, Call], device: torch.device, turns: int, count: int) -> dict[str, Any]:
    """Median seconds of a call and their spread, by rival."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            taken[name].append(rounds.turn(call, count, device).seconds)
    return {name: rounds.summary(times) for name, times in taken.items()}


def describe(batch: int, rows: Mapping[str, Any]) -> list[str]:
    """A line for each rival, and how many times its time is the first one's."""
    own = next(iter(rows.values()))["median_seconds"]
    lines = [f"batch {batch}: ms a call, images a second"]
    for name, row in rows.items():
        middle = row["median_seconds"]
        lines.append(
            f"  {name:38} {1e3 * middle:9.3f} ± {row['spread'] / 2:4.0%} {batch / middle:9.0f}"
            f" {middle / own:7.2f} x"
        )
    return lines


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.deploy_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=positive, nargs="+", default=list(BATCHES), help="images")
    parser.add_argument("--size", type=positive, default=224, help="height and width of an image")
    parser.add_argument("--width", type=float, default=1.0, help="of all networks")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), help="beside the packed one")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        default=["bf16", "fp32"],
        help="of packed",
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--calls", type=positive, default=CALLS, help="of a turn")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; or cpu, to try it")
    parser.add_argument("--count", metavar="TARGET", help="count for this GPU, and measure nothing")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path, line = writable(args.json), command("deploy_gpu", argv)
    try:
        result = _counts(args, line) if args.count else _times(args, line)
    except ValueError as error:  # a size or a width
        raise cli.UserError(str(error)) from error
    if path:
        write_json(path, result)
    return 0


def _times(args: argparse.Namespace, line: str) -> dict[str, Any]:
    """The races of all batches, as a result."""
    device = choose_device(args.device)
    rivals = {word: parse(word) for word in args.rivals}
    points = []
    with torch.no_grad(), as_trainers_run():
        for batch in args.batch:
            images = torch.randn(batch, 3, args.size, args.size, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            calls = {f"packed, {p}": packed_call(p, images, args.width) for p in args.precision}
            calls |= {word: torch_call(each, images, args.width) for word, each in rivals.items()}
            rows = race(calls, device, args.rounds, args.calls)
            points.append({"batch": batch, "size": args.size, "rivals": rows})
            print("\n".join(describe(batch, rows)), flush=True)
    return header(line, device) | {"points": points}


def _counts(args: argparse.Namespace, line: str) -> dict[str, Any]:
    """The counts of all batches, as a result."""
    target, points = parse_target(args.count), []
    if not target.bfloat16:
        raise cli.UserError(f"{target.name} has no bfloat16, in which calls are counted")
    for batch in args.batch:
        rows = counted(target, batch, args.size, args.width)
        points.append({"batch": batch, "size": args.size, "target": target.name, "counts": rows})
        for name, row in rows.items():
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
            print(
                f"batch {batch}, {name}: {row['launches']} launches,"
                f" {row['mb_per_image']:.1f} MB an image ({kernels})"
            )
    return header(line) | {"points": points}


if __name__ == "__main__":
    cli.run(main)
