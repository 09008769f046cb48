"""The whole training loop on real images: loader, teacher and student, alone and together.

The loader runs beside the device, teacher and student one after the other on it. So the loop can
take no less than the longer of loader and teacher + student; the slowest part is the bottleneck.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from benchmarks.rounds import seconds, wait
from benchmarks.steps import training_step
from tritonbnn import cli
from tritonbnn.compute import Compute, searching_convolutions
from tritonbnn.data.ahead import ahead
from tritonbnn.data.batches import MicroBatch, train_batches
from tritonbnn.data.sources import TrainSet, open_source
from tritonbnn.kernels.commands import positive
from tritonbnn.methods import lone_task
from tritonbnn.methods.distill import Distill
from tritonbnn.methods.plain import Plain
from tritonbnn.methods.teacher import load_teacher
from tritonbnn.models import build_model
from tritonbnn.optim import build_optimizer
from tritonbnn.train.captured import WARM_UP, CapturedStep
from tritonbnn.train.checkpoint import State
from tritonbnn.train.engine import FirstBad, take_step, train_one_epoch
from tritonbnn.train.graphs import Graphs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ask for the whole loop."""
    parser.add_argument("--data", type=Path, help="folder with train/ and val/: the whole loop")
    parser.add_argument("--teacher", help="of the loop: resnet34, a file, or none")
    parser.add_argument("--workers", type=cli.at_least(0), default=8, help="of the loader")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of the loop")
    parser.add_argument("--graph", action="store_true", help="of the loop: its step as CUDA graphs")
    parser.add_argument("--loop-steps", type=positive, default=50, help="timed steps of the loop")


def measure_loop(args: argparse.Namespace, device: torch.device) -> dict:
    """Images a second of each part and of the whole.

    Raises:
        cli.UserError: the data or the teacher cannot be had, or several sizes are asked for.
    """
    if args.data is None:
        raise cli.UserError("--teacher needs images: give their folder as --data")
    if len(args.batch) > 1 or len(args.size) > 1:
        raise cli.UserError("the loop takes one --batch and one --size")
    if args.graph and device.type != "cuda":
        raise cli.UserError("--graph captures what a GPU does, and this is a CPU: leave it out")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    source = open_source(
        "images",
        data_dir=args.data,
        image_size=args.size[0],
        augment="imagenet",
        lighting="published",
        seed=0,
        step=args.step,
    )
    normalise = source.train.normalisation
    compute = Compute(device, precision, channels_last=True, normalise=normalise)
    classes = len(source.classes)
    teacher = load_teacher(args.teacher or "none", num_classes=classes, device=device)
    if teacher is not None:
        compute.place_frozen(teacher)
    build = partial(
        build_model,
        args.model,
        num_classes=classes,
        binary_weights=args.step == 2,
        width=args.width,
    )
    batches = partial(_batches, source.train, args.step, args.batch[0], args.workers, compute)
    steps = args.loop_steps
    times = {"loader": _loader_seconds(batches, steps)}
    times |= _device_seconds(build, teacher, next(batches()), compute, steps)
    images = min(args.batch[0], len(source.train))
    graphs = Graphs(device) if args.graph else None
    whole = _loop_seconds(build(), teacher, batches, compute, steps, graphs, images)
    return {
        "model": args.model,
        "step": args.step,
        "precision": precision,
        "batch": images,
        "size": args.size[0],
        "workers": args.workers,
        "graph": args.graph,
        "loop_steps": steps,
        "images_per_second": {name: round(images / t, 2) for name, t in times.items()}
        | {"whole": round(images / whole, 2)},
        "bottleneck": bottleneck(times),
    }


def bottleneck(times: dict[str, float]) -> str:
    """Which part to make faster first.

    Args:
        times: seconds a batch of "loader", "student", and "teacher" if there is one.
    """
    on_device = {name: t for name, t in times.items() if name != "loader"}
    if times["loader"] > sum(on_device.values()):
        return "loader"
    return max(on_device, key=lambda name: on_device[name])


def describe(result: dict) -> str:
    """One line."""
    speeds = result["images_per_second"]
    parts = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    return f"img/s: {parts}; the bottleneck is the {result['bottleneck']}"


def _batches(
    dataset: TrainSet, step: int, batch: int, workers: int, compute: Compute
) -> Iterator[MicroBatch]:
    """The trainer's batches, epoch after epoch; the smaller last one of an epoch is left out."""
    size = min(batch, len(dataset))
    for epoch in count():
        batches = train_batches(
            dataset,
            seed=0,
            step=step,
            epoch=epoch,
            batch_size=size,
            workers=workers,
            pin_memory=compute.on_gpu,
            levels=compute.on_gpu,
        )
        for micro in ahead(batches, compute.device):
            if micro.count == size:
                yield micro


def _loader_seconds(batches: Callable[[], Iterator[MicroBatch]], steps: int) -> float:
    stream = batches()
    next(stream)  # starts the workers
    start = perf_counter()
    for _ in islice(stream, steps):
        pass
    return (perf_counter() - start) / steps


def _device_seconds(
    build: Callable[[], nn.Module],
    teacher: nn.Module | None,
    micro: MicroBatch,
    compute: Compute,
    steps: int,
) -> dict[str, float]:
    """Seconds a batch of the student's training step, and of the teacher's answer."""
    model = build()
    compute.place(model)
    images, labels = compute.to_device(micro.images, micro.labels)
    step = training_step(model, images, labels, bf16=compute.precision == "bf16")
    calls: dict[str, Callable] = {"student": step}
    if teacher is not None:
        calls["teacher"] = partial(_answer, teacher, images, compute)
    for call in calls.values():
        call()
    return {name: seconds(call, steps, compute.device) for name, call in calls.items()}


@torch.no_grad()
def _answer(teacher: nn.Module, images: torch.Tensor, compute: Compute) -> torch.Tensor:
    with compute.autocast(), searching_convolutions(compute.device):
        return teacher(images).float().softmax(dim=1)


def _loop_seconds(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[], Iterator[MicroBatch]],
    compute: Compute,
    steps: int,
    graphs: Graphs | None,
    images: int,
) -> float:
    """Seconds a batch of the trainer's own loop, after its first steps."""
    compute.place(model)
    start = 0.0
    untimed = 1 if graphs is None else WARM_UP + 1

    def timed() -> Iterator[MicroBatch]:
        nonlocal start
        stream = batches()
        yield from islice(stream, untimed)
        wait(compute.device)
        start = perf_counter()
        yield from islice(stream, steps)

    method: Plain | Distill
    if teacher is None:
        method = Plain(Plain.Settings(), lone_task(compute))
    else:
        method = Distill(Distill.Settings(), lone_task(compute, "distill"))
        method.teacher = teacher
    state = State.new(method, model, build_optimizer("adam", model, 1e-3))
    bad = FirstBad(compute.device)
    take = take_step if graphs is None else CapturedStep(state, images, graphs)
    train_one_epoch(state, model, timed(), bad, after_step=lambda: None, take=take)
    wait(compute.device)
    return (perf_counter() - start) / steps
