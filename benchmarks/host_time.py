"""What a training step costs the host alone: our kernels start nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.host_time --model reactnet_a --step 2

A step runs in Python as on a GPU, down to Triton's own launch of every kernel, which is where it
ends: nothing is compiled, and no driver is called. Fused Adam, the count of its steps, which is one
launch too, and the library's convolutions of our kernels start nothing either. Torch's other
operators run on the CPU, on so few numbers that they cost little but their call. A driver's launch,
some 2 us each, comes on top.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.launches import as_on_a_gpu
from benchmarks.output import command
from benchmarks.rivals import parse
from benchmarks.stand_in import standing_in
from benchmarks.steps import LEARNING_RATE
from tritonbnn import cli
from tritonbnn.files import writable, write_json
from tritonbnn.kernels.launch import start
from tritonbnn.kernels.provenance import header
from tritonbnn.kernels.targets import Target, parse_target

CPU = torch.device("cpu")
BATCH, SIZE, WIDTH, CLASSES = 2, 32, 0.25, 10
PARTS = ("forward", "backward", "update")


class _Nothing(CompiledKernel):
    """A kernel that was not compiled, and counts the launches of all such."""

    launches = 0

    def __init__(self) -> None:
        self.name = self.module = "none"
        self.src = self.function = self.packed_metadata = None
        self._run = self._count

    def _count(self, *arguments: Any) -> None:
        _Nothing.launches += 1


def _convolve_nothing(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> list[Any]:
    """Of the gradients to input and weight those that are asked for, unwritten."""
    return [
        torch.empty_like(of) if asked else None
        for of, asked in zip((x, weight), options[-1], strict=False)
    ]


def _compile_nothing(kernel: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Any:
    kernel.cache_key  # noqa: B018  finds the globals that each launch compares
    kernel.device_caches[device][0][key] = nothing = _Nothing()
    return nothing


@contextmanager
def launches_do_nothing(target: Target) -> Iterator[None]:
    """Have kernels of ours launched by Triton, as far as the driver."""

    def launched(kernel: Any, arguments: Any, tile: Any, grid: Any) -> None:
        start(kernel, grid, tile, arguments, CPU)

    with (
        standing_in(GPUTarget(target.backend, target.architecture, target.warp_size)),
        mock.patch.object(JITFunction, "_do_compile", _compile_nothing),
        mock.patch.object(torch, "_fused_adam_"),
        mock.patch.object(torch, "_foreach_add_"),
        mock.patch.object(torch.ops.aten, "convolution_backward", _convolve_nothing),
        as_on_a_gpu(target, launched),
    ):
        yield


@dataclass(frozen=True)
class HostTime:
    """Seconds of a step, by :data:`PARTS`: the median of each; and the launches of our kernels."""

    forward: float
    backward: float
    update: float
    launches: int

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update


def host_time(model: str, *, step: int, bf16: bool, target: Target, runs: int) -> HostTime:
    """Time a step's host work.

    Args:
        model: a network's name.
        step: of the schedule.
        bf16: forward under bf16 autocast.
        target: whose default formulations and tiles our kernels take.
        runs: timed steps.
    """
    network = parse("ours").build(model, step, num_classes=CLASSES, width=WIDTH)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)

    def loss_of() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            logits = network(images)
        return F.cross_entropy(logits.float(), labels)

    times = []
    with launches_do_nothing(target):
        for _ in range(runs + 3):  # the first ones fill caches
            _Nothing.launches = 0
            start = time.perf_counter()
            loss = loss_of()
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            times.append((forward - start, backward - forward, end - backward))
    return HostTime(*map(median, zip(*times[3:], strict=True)), launches=_Nothing.launches)


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reactnet_a", help="a network's name")
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--target", default="sm_90", help="whose default tiles our kernels take")
    parser.add_argument("--runs", type=cli.at_least(1), default=30, help="timed steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    path, target = writable(args.json), parse_target(args.target)
    try:
        taken = host_time(
            args.model, step=args.step, bf16=target.bfloat16, target=target, runs=args.runs
        )
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    parts = {part: round(getattr(taken, part) * 1e3, 3) for part in PARTS}
    said = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items())
    print(f"host time of a step: {taken.total * 1e3:.2f} ms ({said}), {taken.launches} launches")
    if path:
        result = {"total_ms": round(taken.total * 1e3, 3), "parts_ms": parts}
        result["launches"] = taken.launches
        write_json(path, header(command("host_time", argv)) | result)
    return 0


if __name__ == "__main__":
    cli.run(main)
