"""How often a kernel multiplies, by the code that the compiler starts from (Triton's IR).

That code still has its loops as they were written. Their bounds are numbers that follow from the
arguments, the grid and the program, so that what a program multiplies is known exactly, what is
padded and what is multiplied by ones alone included.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from tritonbnn.kernels.launch import Launch

LANES = 32

PROGRAMS = 64
"""Along an axis of the grid, at equal distances, over which what differs is averaged."""

_DEFINITION = re.compile(r"\s*(%\w+) = (arith\.\w+|tt\.get_\w+) ?(.*?) : i\d+(?: to i\d+)?$")
_FOR = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot) .* : tensor<(\d+)x(\d+)x[^*]* \* [!.\w]+<\d+x(\d+)x"
)
_ASM = re.compile(r'tt\.elementwise_inline_asm "(.*?)" \{.*packed_element = (\d+)')
_MMA = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
_RESULT = re.compile(r"-> tensor<((?:\d+x)+)\w+(?:, [^<>]*)?>$")

_ARITHMETIC = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "remsi": lambda a, b: a - _ARITHMETIC["divsi"](a, b) * b,
    "minsi": min,
    "maxsi": max,
    "extsi": lambda a: a,
    "trunci": lambda a: a,
}

Range = tuple[str, str, str]
"""Of a loop: the names of its first value, its end and its step."""


@dataclass(frozen=True)
class Products:
    """Where a kernel multiplies.

    Attributes:
        numbers: operation and operands of each number, by name.
        found: the loops around each product, outermost first, and its multiplications in a block.
    """

    numbers: dict[str, tuple[str, str]]
    found: tuple[tuple[tuple[Range, ...], int], ...]

    def of(self, launch: Launch) -> tuple[float, float]:
        """Multiplications of a block, and turns of the outermost loop around them, on average.

        Raises:
            ValueError: a bound of a loop does not follow from the launch.
        """
        outermost = next((loops[0] for loops, _ in self.found if loops), None)
        multiplied, turned, programs = 0.0, 0.0, list(_some_programs(launch.grid))
        for program in programs:
            values = _Values(self.numbers, launch, program)
            for loops, multiplications in self.found:
                multiplied += multiplications * prod(map(values.turns, loops))
            turned += values.turns(outermost) if outermost else 0
        return multiplied / len(programs), turned / len(programs)


def _some_programs(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Programs of a grid, all of them along an axis that is short."""
    axes = []
    for size in (*grid, 1, 1)[:3]:
        some = min(size, PROGRAMS)
        axes.append([i * size // some for i in range(some)])
    yield from product(*axes)


class _Values:
    """The numbers of one program."""

    def __init__(
        self, numbers: dict[str, tuple[str, str]], launch: Launch, program: tuple[int, ...]
    ) -> None:
        self.numbers, self.launch, self.program = numbers, launch, program
        self.known: dict[str, Any] = {}

    def turns(self, loop: Range) -> int:
        first, end, step = map(self.value, loop)
        return max(0, -((first - end) // step))

    def value(self, name: str) -> Any:
        if name not in self.known:
            self.known[name] = self._value(name)
        return self.known[name]

    def _value(self, name: str) -> Any:
        if name not in self.numbers:
            if name[1:] not in self.launch.arguments:
                raise ValueError(f"how often a loop turns depends on {name}, which is not known")
            return self.launch.arguments[name[1:]]
        operation, operands = self.numbers[name]
        if operation == "arith.constant":
            return {"true": 1, "false": 0}.get(operands) or int(operands)
        if operation.startswith("tt.get_"):
            of = self.program if operation.endswith("id") else (*self.launch.grid, 1, 1)
            return of["xyz".index(operands)]
        bare = operation.removeprefix("arith.")
        if bare not in _ARITHMETIC:
            raise ValueError(f"how often a loop turns depends on {operation}, which is not read")
        return _ARITHMETIC[bare](*(self.value(each) for each in re.findall(r"%\w+", operands)))


def read(ir: str, num_warps: int) -> Products:
    """Find the products of a kernel.

    Args:
        ir: of a Triton kernel before it has layouts, or of a Gluon kernel.
        num_warps: of a block.
    """
    numbers: dict[str, tuple[str, str]] = {}
    found = []
    blocks: list[Range | None] = []
    for line in ir.splitlines():
        line = re.sub(r" loc\(.*\)$", "", line)
        if definition := _DEFINITION.match(line):
            name, operation, operands = definition.groups()
            numbers[name] = operation, operands
        if multiplications := _multiplications(line, num_warps):
            found.append((tuple(each for each in blocks if each), multiplications))
        if line.lstrip().startswith("}"):
            blocks.pop()
        if line.endswith("{"):
            loop = _FOR.search(line)
            blocks.append(loop.groups() if loop else None)
    return Products(numbers, tuple(found))


def _multiplications(line: str, num_warps: int) -> int:
    """Of one operation, in a whole block."""
    if dot := _DOT.search(line):
        return prod(map(int, dot.groups()))
    asm = _ASM.search(line)
    shapes = _MMA.findall(asm[1]) if asm else []
    if not shapes:
        return 0
    result = _RESULT.search(line)
    elements = prod(int(size) for size in result[1].split("x") if size) if result else 0
    # every thread's elements by so many at once, and a warp multiplies together
    times = elements // (LANES * num_warps * int(asm[2]))
    return times * num_warps * sum(prod(map(int, shape)) for shape in shapes)
