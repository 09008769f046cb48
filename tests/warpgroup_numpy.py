"""The warpgroup's one-bit tensor core in numpy: shared memory, copies into it, its assembly.

What lies in shared memory counts for the instruction only once its copy was waited for, and since
then all threads met and the two proxies too, in any order; until then, and from the moment that the
next copy is asked for, there is junk.
"""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np

LANES = 32
BASE = 1024
"""Where shared memory begins, as the hardware keeps the first bytes."""

JUNK = -0x5A5A5A5B


def wgmma_m64nk256(a, descriptor, memory, d):
    """D + popcount(A & B) over 256 bits, of one warpgroup.

    In the PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk256": for lane = 4 group + member
    of a warp, bit i of A lies in row 16 warp + group, + 8 if 32 <= i < 64 or 96 <= i, and in column
    32 member + i % 32, + 128 if i >= 64; element i of D in row 16 warp + group, + 8 if
    i % 4 >= 2, and column 8 (i / 4) + 2 member + i % 2. "Matrix Descriptor Format" and, of what
    has K in one piece and no swizzle, "Canonical Layouts": 8 columns of 16 bytes follow each other,
    the next 8 columns begin a stride later, the next 16 bytes of K a leading offset later.

    Args:
        a: (4 warps, 32 lanes, 4) int32.
        descriptor: of B in shared memory, 64 bits.
        memory: of int32, from ``BASE``.
        d: (4 warps, 32 lanes, N / 2) int32.
    """
    lane = np.arange(4 * LANES).reshape(4, LANES)
    row, member = lane // LANES * 16 + lane % LANES // 4, lane % 4
    matrix_a = np.zeros((64, 8), np.uint32)
    for register in range(4):
        matrix_a[row + 8 * (register % 2), member + 4 * (register // 2)] = a[..., register].view(
            np.uint32
        )
    start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    assert descriptor >> 46 == 0  # no base offset and no swizzle
    column, word = np.arange(2 * d.shape[-1])[:, None], np.arange(8)
    address = start + column // 8 * stride + column % 8 * 16 + word // 4 * leading + word % 4 * 4
    matrix_b = memory[(address - BASE) // 4].view(np.uint32)
    common = matrix_a[:, None] & matrix_b
    product = np.unpackbits(common.view(np.uint8), axis=-1).sum(-1, dtype=np.int32)
    element = np.arange(d.shape[-1])
    rows = row[..., None] + 8 * (element % 4 // 2)
    return d + product[rows, element // 4 * 8 + 2 * member[..., None] + element % 2]


def _multiplied(a, b, acc, is_async):
    """acc + a b, of numbers."""
    return acc + type(acc)(a.data.astype(np.float32) @ np.asarray(b))


class _View(np.ndarray):
    """Of shared memory."""

    def permute(self, order):
        return self.transpose(order)


class SharedMemory:
    """The shared memory of one program, and the copies on their way into it."""

    def __init__(self):
        self.words = None
        self.asked, self.groups, self.landed, self.met = [], [], [], {"fence": [], "barrier": []}

    def allocate(self, dtype, shape, layout):
        assert self.words is None, "one allocation begins at 0, several do not"
        if dtype == np.int32:
            assert (layout.vec, layout.max_phase) == (1, 1)
            self.words = np.full(np.prod(shape), JUNK, np.int32)
        else:  # numbers of 16 bits
            self.words = np.full(np.prod(shape), np.nan, np.float32)
        views = self.words.reshape(shape).view(_View)
        return SimpleNamespace(index=lambda stage: views[int(stage)], store=self.store)

    def store(self, value):
        self.landed.append((self.words, value.data))

    def copy(self, view, pointer, mask=None):
        offset, meant = pointer.addresses(mask)
        assert view.shape == offset.shape
        view[:] = JUNK if view.dtype == np.int32 else np.nan
        self.asked.append((view, np.where(meant, pointer.elements[offset], 0)))

    def commit(self):
        self.groups.append(self.asked)
        self.asked = []

    def wait(self, outstanding):
        while len(self.groups) > outstanding:
            self.landed += self.groups.pop(0)

    def meet(self, by):
        """All threads at a barrier, or the two proxies at a fence."""
        other = "fence" if by == "barrier" else "barrier"
        for view, values in self.met[other]:
            view[:] = values
        self.met[other] = []
        self.met[by] += self.landed
        self.landed = []

    def language(self):
        """What a kernel knows of it: methods of gl, async_copy and hopper."""
        return {
            "allocate_shared_memory": self.allocate,
            "thread_barrier": partial(self.meet, "barrier"),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self.copy,
                commit_group=self.commit,
                wait_group=self.wait,
            ),
            "hopper": SimpleNamespace(
                fence_async_shared=partial(self.meet, "fence"),
                warpgroup_mma=_multiplied,
                warpgroup_mma_wait=lambda outstanding, deps: deps[0],
            ),
        }


_INTEGER = {
    "mov.u32": lambda a: a,
    "cvt.u64.u32": lambda a: a,
    "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "or.b64": lambda a, b: a | b,
    "add.u64": lambda a, b: a + b,
}


def run_assembly(lines, registers, memory):
    """Run a program of integer instructions and ``wgmma``.

    Args:
        lines: the instructions.
        registers: by number, (warps, groups, lanes) each; results are written in place.
        memory: a :class:`SharedMemory`.
    """
    named, fenced, waiting = {}, False, 0

    def value(name):
        if name == "global_smem":
            return BASE
        if name.startswith("$"):
            (only,) = np.unique(registers[int(name[1:])])  # uniform in the block
            return int(only)
        return named[name] if name in named else int(name, 0)

    for line in lines:
        opcode, _, rest = line.partition(" ")
        if opcode == "wgmma.fence.sync.aligned":
            fenced = True
        elif opcode.startswith("wgmma.mma_async.sync.aligned."):
            d, a, descriptor = re.fullmatch(r"\{(.*)\}, \{(.*)\}, (\w+), 1", rest).groups()
            d, a = ([int(name.strip("$")) for name in group.split(",")] for group in (d, a))
            assert opcode.endswith(f".m64n{2 * len(d)}k256.s32.b1.b1.and.popc")
            assert fenced
            waiting += 1
            sums, words = (np.stack([registers[n] for n in each], -1) for each in (d, a))
            sums = sums.copy()
            for first in range(0, len(sums), 4):
                group = np.s_[first : first + 4, 0]
                matrix = (words[group], named[descriptor], memory.words, sums[group])
                sums[group] = wgmma_m64nk256(*matrix)
            registers |= zip(d, np.moveaxis(sums, -1, 0), strict=True)
        elif opcode == "wgmma.wait_group.sync.aligned":
            assert rest == "0"
            waiting = 0
        elif opcode not in (".reg", "wgmma.commit_group.sync.aligned"):
            target, *operands = rest.split(", ")
            named[target] = _INTEGER[opcode](*map(value, operands))
    assert not waiting, "accumulators are read before they are there"


_BITS = {
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
}


def run_bits(lines, registers):
    """The first register after a program of instructions on 32 bits.

    Args:
        lines: the instructions.
        registers: by number, int32.
    """
    named = {f"${number}": value for number, value in registers.items()}
    for line in lines:
        opcode, _, rest = line.partition(" ")
        if opcode == ".reg":
            continue
        target, *operands = rest.split(", ")
        values = (named[name] if name in named else np.uint32(int(name, 0)) for name in operands)
        values = (np.asarray(value).astype(np.uint32) for value in values)
        named[target] = _BITS[opcode](*values).view(np.int32)
    return named["$0"]
