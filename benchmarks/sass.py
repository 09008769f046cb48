"""What the warps of a compiled kernel do, counted in its disassembly (NVIDIA's SASS).

A stretch of code has its work: what one warp issues, moves and multiplies while it runs through it
once. All instructions before the last exit count, as if no branch forward was taken. Lanes are
taken to access words side by side, each its own.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from benchmarks.products import LANES, Products, read
from tritonbnn.kernels import aot
from tritonbnn.kernels.launch import Launch
from tritonbnn.kernels.targets import Target

CACHE_BYTES = 128
"""What the first cache, of which shared memory is a part, moves in a clock."""

WARPGROUP = 4
"""Warps that run one instruction of the warpgroup's tensor core together."""

Work = Counter[str]
"""Of one warp, by what it takes.

Instructions: "issue" has all, "alu", "imad", "fma", "xu" and "fp64" those of one pipe, "spilled"
those that load or store a spilled register. Bytes: "l1" go through the first cache, "l2" come from
the second one to shared memory, "global" go between registers and memory. Multiplications: by name
of the tensor core's instruction.
"""

_PIPES = {
    "alu": (
        "IADD3 VIADD LOP3 SHF ISETP FSETP SEL FSEL FMNMX IMNMX VIMNMX VIADDMNMX LEA PRMT SGXT BMSK"
        " IABS I2FP F2FP PLOP3 P2R R2P"
    ),
    "imad": "IMAD HFMA2 HADD2 HMUL2",
    "fma": "FFMA FADD FMUL",
    "xu": "MUFU POPC FLO BREV I2F F2I F2F FRND",
    "fp64": "DFMA DADD DMUL DSETP",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}

_OPERAND_BITS = {"HMMA": 16, "IMMA": 8, "BMMA": 1, "HGMMA": 16, "IGMMA": 8, "BGMMA": 1}

_LINE = re.compile(r"\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*)")
_WARP_SHAPE = re.compile(r"\.(16)(8)(\d+)\b")
_GROUP_SHAPE = re.compile(r"\.(64)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Loop:
    """A loop of the compiled code.

    Attributes:
        work: of one turn, without the loops within.
        around: whether a loop within multiplies.
    """

    work: Work
    around: bool = False


@dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        spill_bytes: of a thread.
        shared_bytes: of a block.
        products: what it multiplies.
        outside: the work outside of all loops.
        loops: all of them.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    products: Products
    outside: Work
    loops: tuple[Loop, ...]

    @property
    def spills_in_loops(self) -> int:
        """Loads and stores of spilled registers in a turn of all loops: those that cost."""
        return sum(loop.work["spilled"] for loop in self.loops)


@dataclass(frozen=True)
class _Instruction:
    predicate: str | None
    name: str
    modifiers: str
    operands: str


def compiled(launch: Launch, target: Target) -> Code:
    """Compile a launch for a GPU of NVIDIA's and read what it does."""
    kernel = aot.compile_kernel(launch, target)
    registers, spill_bytes, listing = aot.disassemble(kernel.asm["cubin"])
    ir = kernel.asm["ttgir" if launch.kernel.is_gluon() else "ttir"]
    products = read(ir, launch.tile.num_warps)
    return Code(registers, spill_bytes, kernel.metadata.shared, products, *_stretches(listing))


def multiplications(work: Work) -> int:
    """Of the tensor core."""
    return sum(work[name] for name in _OPERAND_BITS)


def _stretches(listing: str) -> tuple[Work, tuple[Loop, ...]]:
    """The work outside of loops, and the loops."""
    instructions, loops = _read(listing)
    last = max(i for i, each in enumerate(instructions) if each.name == "EXIT")
    loops = [loop for loop in loops if loop.start <= last]
    outside, bodies = Work(), {loop: Work() for loop in loops}
    for index, instruction in enumerate(instructions[: last + 1]):
        around = [loop for loop in loops if index in loop]
        work = bodies[min(around, key=len)] if around else outside
        work.update(dict(_work(instruction)))
    within = {loop: [each for each in loops if each != loop and each[0] in loop] for loop in loops}
    return outside, tuple(
        Loop(work, any(multiplications(bodies[each]) for each in within[loop]))
        for loop, work in bodies.items()
    )


def _read(listing: str) -> tuple[list[_Instruction], list[range]]:
    """The instructions of a disassembly, and its loops as ranges among them."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(_Instruction(*found.groups()))
            jump = re.search(r"`\((\.L\w+)\)", line) if found[2] == "BRA" else None
            if jump and jump[1] in labels:
                loops.append(range(labels[jump[1]], len(instructions)))
    # every kernel ends in a branch to itself, which fills its last line
    return instructions, [loop for loop in loops if len(loop) > 1]


def _work(instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """What one instruction adds to a warp's work."""
    name = instruction.name
    yield "issue", 1
    if instruction.predicate and "!PT" in instruction.predicate:
        return  # never true
    if name in _PIPE_OF:
        yield _PIPE_OF[name], 1
    elif name in _OPERAND_BITS:
        yield from _product(instruction)
    elif name in ("LDG", "STG"):
        moved = LANES * _width(instruction)
        yield "global", moved
        yield "l1", max(moved, CACHE_BYTES)
    elif name == "LDGSTS":
        yield "l2", LANES * _width(instruction)
        yield "l1", LANES * _width(instruction)
    elif name in ("LDSM", "STSM"):
        matrices = re.search(r"88\.(\d)", instruction.modifiers)
        yield "l1", CACHE_BYTES * (int(matrices[1]) if matrices else 1)
    elif name in ("LDS", "STS", "LDL", "STL"):
        yield "l1", max(LANES * _width(instruction), CACHE_BYTES)
        if name.endswith("L"):
            yield "spilled", 1
    elif name == "SHFL":
        yield "l1", CACHE_BYTES


def _width(instruction: _Instruction) -> int:
    """Bytes that a lane loads or stores."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    words = instruction.modifiers.split(".")
    return next((sizes[word] for word in words if word in sizes), 4)


def _product(instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """A warp's share of a product: its multiplications, and what it reads of shared memory."""
    name = instruction.name
    grouped = _GROUP_SHAPE.search(instruction.modifiers)
    found = grouped or _WARP_SHAPE.search(instruction.modifiers)
    if found is None:
        raise ValueError(f"no shape in {name}{instruction.modifiers}")
    m, n, k = map(int, found.groups())
    if not grouped:
        yield name, prod((m, n, k))
        return
    yield name, prod((m, n, k)) // WARPGROUP
    in_registers = re.match(r"R\d+, R\d+[.\w]*, gdesc", instruction.operands)
    rows = n if in_registers else m + n
    yield "l1", rows * k * _OPERAND_BITS[name] // 8 // WARPGROUP
