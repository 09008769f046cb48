"""Compile the kernels of a training step in several processes, before the clock runs.

    python -m benchmarks.precompile --model reactnet_a --batch 256 --size 224

Triton compiles a kernel at its first launch, one after the other. Here a step's launches are
recorded on tensors without data, tuned as the GPU's table has them. Triton then looks at their
arguments as at a launch, and compiles into its cache on disk, where the launch finds the kernel. No
process but the first asks the GPU, and with --target not even that one.
"""

import importlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.launches import as_on_a_gpu, in_channels_last
from benchmarks.rivals import parse
from benchmarks.stand_in import StandIn, standing_in
from benchmarks.steps import CLASSES, training_step
from tritonbnn import caches, cli
from tritonbnn.kernels import tiles
from tritonbnn.kernels.config import Table, table_of
from tritonbnn.kernels.launch import interpreted
from tritonbnn.kernels.targets import Target, parse_target, target_of

ALIGNMENT = 16
MOST_PROCESSES = 32


@dataclass(frozen=True)
class Operand:
    """What Triton looks at of a tensor.

    Attributes:
        dtype: its numbers'.
        address: modulo :data:`ALIGNMENT`: an allocation begins at a multiple.
        storage_bytes: of all that it is a view of.
    """

    dtype: torch.dtype
    address: int
    storage_bytes: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.storage_bytes


@dataclass(frozen=True)
class Job:
    """A launch that another process compiles."""

    module: str
    kernel: str
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def jobs_of_step(
    build: Callable[[], nn.Module],
    batch: int,
    size: int,
    *,
    bf16: bool,
    target: Target,
    table: Table | None = None,
) -> list[Job]:
    """What one training step with Adam launches of ours, each kernel once.

    Args:
        build: makes the network on torch's default device.
        batch: images of the step.
        size: height and width of an image.
        bf16: forward under bf16 autocast.
        target: whose default formulations and tiles our kernels take.
        table: what is tuned, and taken in their place.
    """
    found: dict[Any, Job] = {}

    def launched(kernel: Any, arguments: dict[str, Any], tile: Any, grid: Any) -> None:
        constants = {each.name for each in kernel.params if each.is_constexpr}
        job = _job(kernel, arguments, tile)
        found.setdefault(_identity(job, constants), job)

    with FakeTensorMode(), as_on_a_gpu(target, launched, table):
        model = in_channels_last(build())
        images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        training_step(model, images, torch.zeros(batch, dtype=torch.int64), bf16=bf16)()
    return list(found.values())


def _job(kernel: Any, arguments: dict[str, Any], tile: Any) -> Job:
    operands = {
        name: _operand(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    function = kernel.fn
    return Job(function.__module__, function.__name__, operands, tile.num_warps, tile.num_stages)


def _operand(tensor: Tensor) -> Operand:
    address = tensor.storage_offset() * tensor.itemsize % ALIGNMENT
    return Operand(tensor.dtype, address, tensor.untyped_storage().nbytes())


def _identity(job: Job, constants: set[str]) -> tuple[Any, ...]:
    """Equal for launches that Triton compiles alike: of a number, what it specialises on."""

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, Operand):
            return value.dtype, value.address, value.storage_bytes < 2**31
        if isinstance(value, int) and name not in constants:
            return value == 1, value % ALIGNMENT == 0, value.bit_length() > 31
        return value

    kinds = tuple(kind(*argument) for argument in job.arguments.items())
    return job.module, job.kernel, kinds, job.num_warps, job.num_stages


def compile_job(job: Job) -> str:
    """Compile a launch for the driver's GPU; why it cannot be, or "". Triton keeps it on disk."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    try:
        kernel.warmup(**job.arguments, grid=(1,), **options)
    except Exception as error:  # whatever a compiler raises is told, and others go on
        said = (str(error).strip() or repr(error)).splitlines()[0]
        return f"{job.kernel}: {said}"
    return ""


def _begin(gpu: GPUTarget) -> None:
    """In a process of the pool: no driver is asked."""
    driver.set_active(StandIn(gpu))


def compile_all(jobs: list[Job], gpu: GPUTarget, processes: int) -> list[str]:
    """Compile launches in several processes; why those that cannot be are not."""
    if processes == 1:
        with standing_in(gpu):
            return [said for job in jobs if (said := compile_job(job))]
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (gpu,))
    with pool:
        return [said for said in pool.map(compile_job, jobs) if said]


def main(argv: list[str]) -> int:
    """Command line. Returns 1 if a kernel cannot be compiled."""
    parser = cli.Parser(prog="python -m benchmarks.precompile", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reactnet_a", help="a network's name")
    parser.add_argument("--batch", type=cli.at_least(2), default=256, help="images of a step")
    parser.add_argument(
        "--size", type=cli.at_least(1), default=224, help="height and width of an image"
    )
    parser.add_argument("--step", type=int, default=2, choices=(1, 2), help="of the schedule")
    parser.add_argument("--processes", type=cli.at_least(1, 1024), help="one a processor if absent")
    parser.add_argument("--target", help="for a GPU that is not there, as in sm_90")
    given = parser.parse_args(argv)
    began = time.monotonic()
    if interpreted(tiles.popcount):
        raise cli.UserError("interpreted kernels are not compiled: unset TRITON_INTERPRET")
    caches.prepare(caches.TRITON)
    target, gpu, table = _chosen(given.target)

    def build() -> nn.Module:
        return parse("ours").build(given.model, given.step, num_classes=CLASSES)

    try:
        how = {"bf16": target.bfloat16, "target": target, "table": table}
        jobs = jobs_of_step(build, given.batch, given.size, **how)
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    processes = given.processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    failed = compile_all(jobs, gpu, processes)
    for said in failed:
        print(f"cannot be compiled: {said}")
    print(
        f"compiled {len(jobs) - len(failed)} of {len(jobs)} kernels of a step for {gpu.backend}"
        f" {gpu.arch} by {processes} processes in {time.monotonic() - began:.0f} s"
    )
    return int(bool(failed))


def _chosen(name: str | None) -> tuple[Target, GPUTarget, Table]:
    """Whose defaults are taken, what is compiled for, and what is tuned: of a name or the GPU."""
    if name is not None:
        target = parse_target(name)
        return target, gpu_of(target), {}
    if not torch.cuda.is_available():
        raise cli.UserError("no CUDA device here: name a GPU with --target, as in sm_90")
    table = table_of(torch.cuda.get_device_name())
    return target_of(torch.device("cuda")), driver.active.get_current_target(), table


def gpu_of(target: Target) -> GPUTarget:
    """A target as Triton names it."""
    return GPUTarget(target.backend, target.architecture, target.warp_size)


if __name__ == "__main__":
    cli.run(main)
