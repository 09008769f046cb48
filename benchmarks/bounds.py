"""The least time of a launch of ours, by the instructions that it compiled to, and an estimate.

A launch takes at least as long as each of these alone:

    dram     its bytes at the rate of a large copy
    l2       what it asks of the second cache for shared memory
    l1       what goes through the first cache, of which shared memory is a part
    issue    its instructions, by the schedulers and by their pipes
    tensor   its multiplications by the tensor core

The last three are of the multiprocessor with the most blocks. How often a loop turns follows from
the launch: a loop with products until they are done, another over rows as often as there are blocks
of rows, and any other until the launch's bytes have been moved.
"""

import ast
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from torch import Tensor
from tqdm import tqdm

from benchmarks.launches import SMALL, Counted, of_ours
from benchmarks.multiprocessor import MACHINES, Machine
from benchmarks.sass import Code, Work, compiled, multiplications
from tritonbnn.cli import UserError
from tritonbnn.kernels.config import ceil_div
from tritonbnn.kernels.launch import Launch, interpreted
from tritonbnn.kernels.targets import Target

LIMITS = {"dram": 0.88, "l2": 0.88, "l1": 0.7, "issue": 0.6, "tensor": 0.7}
"""What bounds a launch, and the share of it that kernels are taken to reach: barriers and latency
cost the rest. What nearly fills the first cache are the tensor core's operands, hence as much."""


@dataclass(frozen=True)
class Bound:
    """What a launch takes at least.

    Attributes:
        code: what it compiled to.
        blocks: of it that a multiprocessor runs at once.
        turns: of each loop, for one block.
        seconds: the least by what holds it up, see above.
        late: the share of its bytes that moves before or after a product, while nothing multiplies:
            the multiprocessor has no other block.
    """

    code: Code
    blocks: int
    turns: tuple[float, ...]
    seconds: dict[str, float]
    late: float

    @property
    def least(self) -> float:
        """Seconds."""
        return max(self.seconds.values())

    @property
    def binding(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def estimate(self) -> float:
        """Seconds, without starting it."""
        taken = {name: least / LIMITS[name] for name, least in self.seconds.items()}
        moving = taken.pop("dram")
        working = max(taken.values())
        return max(working, moving * (1 - self.late)) + moving * self.late


def bound_of(launch: Launch, target: Target, copy_gbs: float) -> Bound:
    """The bound of a launch as it was recorded, with its tile and grid; see :func:`bound`."""
    return bound(of_ours(launch), compiled(launch, target), MACHINES[target.name], copy_gbs)


def bound(counted: Counted, code: Code, machine: Machine, copy_gbs: float) -> Bound:
    """The bound of a launch.

    Args:
        counted: one of ours, see :func:`benchmarks.launches.of_ours`.
        code: what it compiled to.
        machine: that runs it.
        copy_gbs: 1e9 bytes read and written a second by a large copy.

    Raises:
        ValueError: the launch multiplies, but not on a tensor core.
    """
    launch = counted.launch
    if counted.operations and not _multiplies(code):
        raise ValueError(f"{counted.name} has no tensor-core instruction to count its loop by")
    warps, programs = launch.tile.num_warps, prod(launch.grid)
    turns = tuple(_turns(counted, code))
    work = Work(code.outside)
    for loop, times in zip(code.loops, turns, strict=True):
        work.update({name: amount * times for name, amount in loop.work.items()})
    blocks = machine.resident(code, warps)
    most = ceil_div(programs, machine.multiprocessors)
    seconds = {"dram": counted.bytes / (copy_gbs * 1e9)}
    if machine.l2_bytes:
        seconds["l2"] = work["l2"] * warps * programs / machine.l2_bytes / machine.hertz
    for name, clocks in machine.clocks(work, warps).items():
        seconds[name] = clocks * most / machine.hertz
    late = 0.0
    if blocks == 1 and multiplications(work):
        named = named_in_loops(launch.kernel)
        late = sum(n for name, n in counted.tensors.items() if name not in named) / counted.bytes
    return Bound(code, blocks, turns, seconds, late)


@cache
def named_in_loops(kernel: Any) -> frozenset[str]:
    """The tensors that a kernel's source names within a loop."""
    loops = [node for node in ast.walk(kernel.parse()) if isinstance(node, ast.For)]
    names = [node.id for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Name)]
    return frozenset(name.removesuffix("_ptr") for name in names if name.endswith("_ptr"))


def _multiplies(code: Code) -> bool:
    return any(map(multiplications, (code.outside, *(loop.work for loop in code.loops))))


def _turns(counted: Counted, code: Code) -> Iterable[float]:
    """How often each loop turns in a block, on average.

    Compilers unroll: a loop turns as often as its products ask for, and not as its source says.
    """
    launch = counted.launch
    programs, warps = prod(launch.grid), launch.tile.num_warps
    done, outermost = code.products.of(launch)
    left = done / warps - multiplications(code.outside)
    left -= sum(outermost * multiplications(loop.work) for loop in code.loops if loop.around)
    inner = sum(multiplications(loop.work) for loop in code.loops if not loop.around)
    moved = sum(loop.work["global"] for loop in code.loops)
    for loop in code.loops:
        if loop.around:
            yield outermost
        elif multiplications(loop.work):
            yield left / inner
        elif "rows" in launch.arguments:
            of = launch.arguments
            tiles = ceil_div(of["rows"], of["BLOCK_M"]) * ceil_div(of["CHANNELS"], of["BLOCK_N"])
            yield tiles / programs
        elif loop.work["global"]:
            yield max(1, counted.bytes / programs / warps / moved)
        else:
            yield 1


def bounds_of(counted: list[Counted], target: Target, copy_gbs: float) -> list[Bound | None]:
    """The bound of each launch of ours that is worth one; None of others.

    Args:
        counted: of a step.
        target: whose instructions are counted; without a machine of it there are no bounds.
        copy_gbs: 1e9 bytes read and written a second by a large copy.

    Raises:
        UserError: the kernels are interpreted in this process.
    """
    if target.name not in MACHINES:
        return [None] * len(counted)
    if any(each.launch and interpreted(each.launch.kernel) for each in counted):
        raise UserError("interpreted kernels have no instructions to count: unset TRITON_INTERPRET")
    worth = [each for each in counted if each.launch and (each.bytes >= SMALL or each.operations)]
    codes = compile_all([each.launch for each in worth], target)
    machine = MACHINES[target.name]
    found = {
        id(each): bound(each, code, machine, copy_gbs)
        for each, code in zip(worth, codes, strict=True)
    }
    return [found.get(id(each)) for each in counted]


_to_compile: tuple[list[Launch], Target] | None = None


def compile_all(launches: list[Launch], target: Target) -> list[Code]:
    """What each launch compiles to, on all cores. Equal kernels are compiled once."""
    names = [_identity(launch) for launch in launches]
    distinct = dict(zip(names, launches, strict=True))
    context = multiprocessing.get_context("fork")  # launches cannot be sent, only inherited
    remember = (list(distinct.values()), target)
    with ProcessPoolExecutor(mp_context=context, initializer=_keep, initargs=remember) as pool:
        made = pool.map(_compiled, range(len(distinct)))
        bar = tqdm(made, total=len(distinct), unit="kernel", leave=False, disable=None)
        codes = dict(zip(distinct, bar, strict=True))
    return [codes[name] for name in names]


def _keep(launches: list[Launch], target: Target) -> None:
    global _to_compile
    _to_compile = launches, target


def _compiled(index: int) -> Code:
    assert _to_compile is not None
    launches, target = _to_compile
    return compiled(launches[index], target)


def _identity(launch: Launch) -> tuple[Any, ...]:
    """What makes two launches compile to the same kernel: of numbers, divisibility alone."""
    kinds: list[Any] = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            kinds.append(value.dtype)
        elif parameter.is_constexpr or not isinstance(value, int):
            kinds.append(value)
        else:
            kinds.append(value % 16 == 0)
    return launch.kernel.__name__, launch.tile.num_warps, launch.tile.num_stages, tuple(kinds)
