"""A training step: ours against the expert's code, its compiled forms, and the float twin.

    python -m benchmarks.train_step --batch 256 --size 224 --step 2
    python -m benchmarks.train_step --batches 64,128,256,512 --rivals ours+bf16,expert
    python -m benchmarks.train_step --recipe digits --threads 1
    python -m benchmarks.train_step --teacher resnet34 --data DIR

Rivals take turns, so that a change in the machine's load hits all; on a CPU each has a process of
its own, as a user's network has. All have the same number of threads, the same batch and fused
Adam. Each is first seen to train. A rival that runs out of memory is
reported with the largest batch that fits. The floor is that of our design, from ceilings measured
in the same run (see benchmarks.roofline). On a CPU, our step is shown by pass of the C functions,
each with its own bound (see benchmarks.passes). With --data, the whole loop is measured: loader,
teacher and student.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks import ceilings, loop, passes, roofline
from benchmarks.measure import has_failed, measure, own_processes, trouble
from benchmarks.output import command
from benchmarks.point import Point
from benchmarks.rivals import DEFAULTS, NETWORKS, OPTIONS, OWN, Rival, chosen
from benchmarks.steps import CLASSES, as_trainers_run
from tritonbnn import cli
from tritonbnn.compute import choose_device
from tritonbnn.data.sources import SOURCES
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.commands import positive
from tritonbnn.kernels.provenance import header
from tritonbnn.models.registry import MODELS
from tritonbnn.train.arguments import parse

ROUNDS = 5
STRIDE = 32
"""Pixels of an image for one of a network's last layer."""
TURN_STEPS = {"cuda": 20, "cpu": 2}
"""Steps of a turn, by device: a GPU's turn is then long beside the clock's grain, and of a CPU's
steps, which take seconds, most are timed."""
SHAPE = {
    "model": "reactnet_a",
    "batch": [8],
    "size": [224],
    "width": 1.0,
    "in_channels": 3,
    "small_images": False,
    "classes": CLASSES,
}
"""What is measured where neither a flag nor a recipe says otherwise."""

KNOWN_CLASSES = {"digits": 10, "fashion": 10, "cifar10": 10, "cifar100": 100}
"""How many classes a data set has, where its name says it."""


def sizes(text: str) -> list[int]:
    """Positive integers parted by commas."""
    return [positive(part) for part in text.split(",")]


def parser() -> cli.Parser:
    result = cli.Parser(
        prog="python -m benchmarks.train_step",
        description=__doc__.split("\n")[0],
        epilog=f"A rival is one of {', '.join((*OWN, *NETWORKS))}, with +{', +'.join(OPTIONS)}.",
    )
    result.add_argument("--recipe", help="of the trainer: gives all that these flags do not")
    result.add_argument("--model", choices=sorted(MODELS), help="default: reactnet_a")
    result.add_argument("--batch", "--batches", type=sizes, help="images of a step; default: 8")
    result.add_argument("--size", "--sizes", type=sizes, help="of an image; default: 224")
    result.add_argument("--width", type=float, help="multiplies all channels; default: 1")
    result.add_argument("--in-channels", type=int, choices=(1, 3), help="of an image; default: 3")
    result.add_argument(
        "--small-images", action="store_true", default=None, help="a stem of stride 1"
    )
    result.add_argument("--classes", type=cli.at_least(2), help=f"default: {CLASSES}")
    result.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    result.add_argument("--rivals", help=f"default: {', '.join(DEFAULTS['cuda'])} on a GPU")
    result.add_argument("--rounds", type=positive, default=ROUNDS)
    result.add_argument(
        "--steps",
        type=positive,
        help="of a turn; {cuda} on a GPU, {cpu} on a CPU".format(**TURN_STEPS),
    )
    result.add_argument("--no-details", action="store_true", help="neither profile nor count")
    result.add_argument(
        "--floor", action=argparse.BooleanOptionalAction, help="of our kernels; on a GPU by default"
    )
    result.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    result.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="of the CPU, for each"
    )
    result.add_argument("--json", type=Path, help="write the result here")
    loop.add_arguments(result)
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    path = writable(args.json)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    fill_shape(args)
    if args.floor is None:  # on a CPU other kernels run than are counted
        args.floor = device.type == "cuda" and not args.small_images
    rivals = chosen(args.rivals, device, args.model)
    check_sizes(args)
    head = header(command("train_step", argv), device)
    with as_trainers_run():
        for result in measured(args, device, rivals):
            if path:
                write_json(path, head | result)
    return int(any(ours_failed(point, rivals) for point in result.get("points", ())))


def fill_shape(args: argparse.Namespace) -> None:
    """Take what no flag says from the recipe, or else from :data:`SHAPE`.

    Raises:
        cli.UserError: there is no such recipe.
    """
    shape = dict(SHAPE)
    if args.recipe:
        config = parse([args.recipe]).config
        shape |= {name: getattr(config, name) for name in ("model", "width", "small_images")}
        shape |= {"batch": [config.batch_size], "size": [config.image_size]}
        shape["in_channels"] = SOURCES[config.dataset].channels
        shape["classes"] = KNOWN_CLASSES.get(config.dataset, CLASSES)
    for name, value in shape.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse what no rival can train on, before a process is started for each to say so.

    Raises:
        cli.UserError: the width is no size, BatchNorm would see one value per channel, or the floor
            is asked for where it is not counted.
    """
    if args.floor and args.small_images:
        raise cli.UserError("--floor counts no network for small images: leave one of the two out")
    if not 0 < args.width < math.inf:
        raise cli.UserError(f"--width must be above 0 and finite, not {args.width}")
    if 1 in args.batch and min(args.size) <= STRIDE:
        raise cli.UserError(
            f"one image of {min(args.size)} x {min(args.size)} ends as one value per channel, which"
            f" BatchNorm cannot train on: take a --batch above 1 or a --size above {STRIDE}"
        )


def ours_failed(point: dict, rivals: dict[str, Rival]) -> bool:
    """Whether one of our own networks could not be timed."""
    rows = point["rows"].items()
    return any(has_failed(row) for name, row in rows if rivals[name].network in OWN)


def measured(
    args: argparse.Namespace, device: torch.device, rivals: dict[str, Rival]
) -> Iterator[dict]:
    """What the flags ask for: a result, and again whenever it has grown."""
    if args.data is not None or args.teacher is not None:
        result = loop.measure_loop(args, device)
        print(loop.describe(result))
        yield result
    else:
        yield from compare(args, device, rivals)


def compare(
    args: argparse.Namespace, device: torch.device, rivals: dict[str, Rival]
) -> Iterator[dict]:
    """Rivals at every batch size and resolution; tables are printed as they come."""
    roofs = ceilings.measure(device) if args.floor else None
    if roofs:
        print(roofs)
    count = args.steps or TURN_STEPS[device.type]
    points = []
    for batch, size in product(args.batch, args.size):
        image = (args.in_channels, args.small_images, args.classes)
        point = Point(args.model, args.step, batch, size, args.width, device, *image)
        progress = partial(say, f"batch {batch}, {size} x {size}")
        turns = {"turns": args.rounds, "count": count}
        rows = measure(point, rivals, **turns, details=not args.no_details, say=progress)
        points.append({"batch": batch, "size": size, "rows": rows})
        if roofs:
            floors = roofline.report(args.model, batch, size, args.width, args.step, roofs)
            add_shares(rows, rivals, floors)
            points[-1]["floors"] = floors
        print("\n".join(table(points[-1])), flush=True)
        yield {
            "model": args.model,
            "step": args.step,
            "width": args.width,
            "in_channels": args.in_channels,
            "small_images": args.small_images,
            "classes": args.classes,
            "rounds": args.rounds,
            "steps_of_a_turn": count,
            "own_processes": own_processes(device),
            **({"ceilings": asdict(roofs)} if roofs else {}),
            "points": points,
        }


def say(where: str, what: str) -> None:
    """A line on progress, for whoever waits."""
    print(f"{where}: {what}", file=sys.stderr, flush=True)


def add_shares(rows: dict[str, dict], rivals: dict[str, Rival], floors: dict[str, dict]) -> None:
    """Relate each time to the floor of our design in the same dtype, under its faster plan."""
    for name, row in rows.items():
        if "median_seconds" in row:
            dtype = "bf16" if rivals[name].bf16 else "fp32"
            least = min(floors[f"{dtype} {plan}"]["ms"] for plan in roofline.PLANS)
            row["share_of_floor"] = round(least / (1e3 * row["median_seconds"]), 4)


def table(point: dict) -> Iterator[str]:
    """A line for each rival, then the floors."""
    rows = point["rows"]
    yield f"batch {point['batch']}, {point['size']} x {point['size']}"
    for name, row in rows.items():
        if "median_seconds" not in row:
            yield f"  {name:40} {trouble(row)}"
            continue
        saved = ""
        if "saved_mb_per_image" in row:
            saved = f"{row['saved_mb_per_image']:8.2f} MB/img saved"
        share = f" {row['share_of_floor']:6.1%} of the floor" if "share_of_floor" in row else ""
        peak = f"{row['peak_mb']:9.0f} MB peak " if "peak_mb" in row else ""
        worked = f"{1e3 * row['cpu_seconds']:9.1f} thread-ms" if "cpu_seconds" in row else ""
        yield (
            f"  {name:40} {1e3 * row['median_seconds']:9.1f} ms ±{row['spread'] / 2:5.1%}{worked}"
            f" {row['images_per_second']:9.2f} img/s{share} {peak}{saved}"
        )
        for kind, unit in (("time_ms", "ms"), ("moved_mb", "MB moved")):
            parts = (f"{family} {value:.1f}" for family, value in row.get(kind, {}).items())
            if kind in row:
                yield f"  {'':40} {unit}: {', '.join(parts)}"
        yield from (f"  {'':40} {line}" for line in passes.describe(row))
    yield from roofline.describe(point.get("floors", {}))


if __name__ == "__main__":
    cli.run(main)
