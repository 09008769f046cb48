"""Run a Gluon kernel's own Python in numpy, with the one-bit tensor core as PTX defines it.

A bfloat16 is a float32 here, rounded where a kernel rounds.

Triton's interpreter has no Gluon and no inline assembly. Tensors here are arrays; what a thread
holds is read from the layouts, where a kernel makes a difference of it: at inline assembly.
"""

import operator
import re
from functools import partial
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction

from tests.warpgroup_numpy import SharedMemory, run_assembly, run_bits
from tritonbnn.kernels import (
    below_triton,
    conv_warpgroup,
    input_grad_warpgroup,
    mma,
    mma_peak,
    mma_unit,
    mma_unit_grad,
    mma_warpgroup,
    weight_grad_warpgroup,
)

LANES = 32

BFLOAT16 = "bfloat16"
"""What a kernel takes for a dtype that numpy has not."""


def mma_m16n8k256(a, b, c):
    """D = C + popcount(A & B) over 256 bits, per-lane fragments in and out.

    "Matrix Fragments for mma.m16n8k256" in the PTX ISA: for lane = 4 group + member, bit i of the
    fragment of A lies in row group, + 8 if 32 <= i < 64 or 96 <= i, and in column
    32 member + i % 32, + 128 if i >= 64; bit i of B lies in row 32 member + i % 32, + 128 if
    i >= 32, and column group; element i of C and D lies in row group, + 8 if i >= 2, and column
    2 member + i % 2.

    Args:
        a: (..., 32 lanes, 4) int32.
        b: (..., 32 lanes, 2) int32.
        c: (..., 32 lanes, 4) int32.
    """
    group, member = np.divmod(np.arange(LANES), 4)
    matrix_a = np.zeros((*a.shape[:-2], 16, 8), np.uint32)
    matrix_b = np.zeros((*b.shape[:-2], 8, 8), np.uint32)  # by column, words of K
    for register in range(4):
        rows = group + 8 * (register % 2)
        matrix_a[..., rows, member + 4 * (register // 2)] = a[..., register].view(np.uint32)
    for register in range(2):
        matrix_b[..., group, member + 4 * register] = b[..., register].view(np.uint32)
    common = matrix_a[..., :, None, :] & matrix_b[..., None, :, :]
    product = np.unpackbits(common.view(np.uint8), axis=-1).sum(-1, dtype=np.int32)
    d = np.empty_like(c)
    for register in range(4):
        rows, columns = group + 8 * (register // 2), 2 * member + register % 2
        d[..., register] = c[..., register] + product[..., rows, columns]
    return d


class Array:
    """A tensor of a kernel: its values, and its layout where one was given."""

    def __init__(self, data, layout=None):
        self.data, self.layout = np.asarray(data), layout

    @property
    def shape(self):
        return self.data.shape

    def to(self, dtype, bitcast=False):
        if not bitcast and dtype == BFLOAT16:
            rounded = torch.from_numpy(np.array(self.data, np.float32)).bfloat16().float()
            return Array(rounded.numpy(), self.layout)
        if not bitcast:
            return Array(self.data.astype(dtype), self.layout)
        bits = self.data.astype(np.uint16)
        if dtype == BFLOAT16:
            return Array((bits.astype(np.uint32) << 16).view(np.float32), self.layout)
        return Array(bits.view(dtype), self.layout)

    def reshape(self, shape):
        return Array(self.data.reshape(shape))

    def permute(self, *order):
        return Array(self.data.transpose(order))

    def __getitem__(self, index):
        layout = self.layout
        for new in index if isinstance(index, tuple) else ():
            if new is None and isinstance(layout, gl.SliceLayout):
                layout = layout.parent
        return Array(self.data[index], layout)

    def __index__(self):
        return int(self.data)

    def __bool__(self):
        return bool(self.data)


def _binary(function):
    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        values = other.data if isinstance(other, Array) else other
        if function in (operator.floordiv, operator.mod):
            assert (self.data >= 0).all()  # below 0 the GPU rounds towards 0 and Python does not
        return Array(function(self.data, values), self.layout)

    return method


_NAMES = ("add", "sub", "mul", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift")
for _name in (*_NAMES, "truediv"):
    setattr(Array, f"__{_name.strip('_')}__", _binary(getattr(operator, _name)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Array, f"__{_name}__", _binary(getattr(operator, _name)))
for _name in ("add", "mul"):
    setattr(Array, f"__r{_name}__", _binary(getattr(operator, _name)))
for _name in ("sub", "and_", "lshift", "rshift"):
    swapped = partial(lambda function, x, y: function(y, x), getattr(operator, _name))
    setattr(Array, f"__r{_name.strip('_')}__", _binary(swapped))


class Pointer:
    """An address into a tensor's elements, or an array of them."""

    def __init__(self, elements, offset=0, dtype=None):
        self.elements, self.offset = elements, offset
        self.dtype = SimpleNamespace(element_ty=dtype or elements.dtype)

    def __add__(self, offset):
        return Pointer(self.elements, offset + self.offset, self.dtype.element_ty)

    def __getitem__(self, index):
        return Pointer(self.elements, self.offset[index], self.dtype.element_ty)

    __radd__ = __add__

    def to(self, dtype, bitcast):
        """To elements of another size."""
        assert bitcast
        return Pointer(self.elements.view(dtype), self.offset)

    def addresses(self, mask):
        """The flat addresses, and where they are meant; an address meant must exist."""
        offset = self.offset.data
        shape = offset.shape if mask is None else np.broadcast_shapes(offset.shape, mask.shape)
        meant = np.broadcast_to(True if mask is None else mask.data, shape)
        offset = np.broadcast_to(offset, shape)
        inside = (offset >= 0) & (offset < self.elements.size)
        assert inside[meant].all(), "an address lies outside of its tensor"
        return np.where(meant, offset, 0), meant


def _where(condition, x, y):
    values = (each.data if isinstance(each, Array) else each for each in (x, y))
    return Array(np.where(condition.data, *values), condition.layout)


def load(pointer, mask=None, other=0):
    offset, meant = pointer.addresses(mask)
    return Array(np.where(meant, pointer.elements[offset], pointer.elements.dtype.type(other)))


def store(pointer, value, mask=None):
    offset, meant = pointer.addresses(mask)
    places = offset[meant]
    assert len(np.unique(places)) == len(places), "two threads write to one address"
    pointer.elements[places] = np.broadcast_to(value.data, offset.shape)[meant]


def places(layout):
    """Which element each register of each lane of each warp holds: flat (warps, lanes, registers).

    A linear layout is the exclusive or of the bases of an index's bits.
    """
    shape = layout.shape
    held = []
    for bases in (layout.warp_bases, layout.lane_bases, layout.reg_bases):
        bits = np.arange(1 << len(bases))[:, None] >> np.arange(len(bases)) & 1
        steps = np.array(bases, dtype=np.int64).reshape(len(bases), len(shape))
        held.append(np.bitwise_xor.reduce(bits[:, :, None] * steps, axis=1))
    warps, lanes, registers = held
    index = warps[:, None, None] ^ lanes[None, :, None] ^ registers[None, None]
    flat = np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), shape)
    assert np.array_equal(np.sort(flat, axis=None), np.arange(np.prod(shape)))
    return flat


def inline_asm_elementwise(num_warps, shared, asm, constraints, args, dtype, is_pure, pack):
    """The assembly, for every warp and every ``pack`` elements of a thread."""
    layout = args[-1].layout
    assert isinstance(layout, gl.DistributedLinearLayout)
    flat = places(layout)
    assert len(flat) == num_warps
    halves = dtype in (BFLOAT16, np.float16)
    operands = []
    for arg in args:
        values = arg.data if isinstance(arg, Array) else np.int32(arg)
        values = np.broadcast_to(values, layout.shape).reshape(-1)[flat]
        values = values.reshape(*flat.shape[:2], -1, pack)  # warp, lane, group, element
        values = np.moveaxis(values, (3, 1), (0, 3))  # element, warp, group, lane
        if halves and values.dtype.kind == "f":  # two numbers of 16 bits in a register
            values = _bits_of(values, dtype)
            values = (values[::2] | values[1::2] << 16).view(np.int32)
        operands += list(values)
    kinds = getattr(constraints, "value", constraints).split(",")
    results = sum(kind.startswith("=") for kind in kinds)
    assert len(kinds) == results + len(operands)
    registers = dict(enumerate([None] * results + operands))
    for number, kind in enumerate(kinds):
        if kind.isdigit():
            registers[int(kind)] = registers[number]
    lines = getattr(asm, "value", asm).strip().removeprefix("{").removesuffix("}").split(";")
    lines = [line.strip() for line in lines if line.strip()]
    if any("wgmma" in line for line in lines):
        run_assembly(lines, registers, shared)
        lines = []
    if halves:
        found = run_bits(lines, registers).view(np.uint32)
        result = np.stack([_numbers_of(found & 0xFFFF, dtype), _numbers_of(found >> 16, dtype)])
        dtype = result.dtype
        lines = []
    for line in lines:
        assert "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc" in line
        d, a, b, c = (
            [int(n) for n in re.findall(r"\$(\d+)", group)] for group in re.findall("{(.*?)}", line)
        )
        a, b, c = (np.stack([registers[n] for n in group], axis=-1) for group in (a, b, c))
        registers |= zip(d, np.moveaxis(mma_m16n8k256(a, b, c), -1, 0), strict=True)
    if not halves:
        result = np.stack([registers[n] for n in range(results)])  # element, warp, group, lane
    values = np.empty(np.prod(layout.shape), dtype)
    values[flat.reshape(-1)] = np.moveaxis(result, (0, 3), (3, 1)).reshape(-1)
    return Array(values.reshape(layout.shape), layout)


def _bits_of(values, dtype):
    """The bits of numbers of 16 bits, as uint32."""
    if dtype == BFLOAT16:
        return values.astype(np.float32).view(np.uint32) >> 16
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def _numbers_of(bits, dtype):
    if dtype == BFLOAT16:
        return (bits << 16).view(np.float32)
    return bits.astype(np.uint16).view(np.float16)


def _language(program, grid, num_warps):
    """Gluon's language as far as the kernels use it, for one program."""
    shared = SharedMemory()
    return SimpleNamespace(
        constexpr=gl.constexpr,
        BlockedLayout=gl.BlockedLayout,
        SliceLayout=gl.SliceLayout,
        SwizzledSharedLayout=gl.SwizzledSharedLayout,
        DistributedLinearLayout=gl.DistributedLinearLayout,
        int1=np.bool_,
        uint8=np.uint8,
        uint16=np.uint16,
        pointer_type=lambda dtype: dtype,
        int32=np.int32,
        DotOperandLayout=gl.DotOperandLayout,
        NVMMADistributedLayout=gl.NVMMADistributedLayout,
        NVMMASharedLayout=gl.NVMMASharedLayout,
        int16=np.int16,
        int64=np.int64,
        uint32=np.uint32,
        float32=np.float32,
        bfloat16=BFLOAT16,
        static_range=range,
        program_id=lambda axis: Array(np.int32(program[axis])),
        num_programs=lambda axis: Array(np.int32(grid[axis])),
        arange=lambda start, end, layout: Array(np.arange(start, end, dtype=np.int32), layout),
        full=lambda shape, value, dtype, layout: Array(np.full(shape, value, dtype), layout),
        expand_dims=lambda x, axis: Array(np.expand_dims(x.data, axis)),
        convert_layout=lambda x, layout: Array(x.data, layout),
        where=_where,
        sum=lambda x, axis: Array(x.data.sum(axis, dtype=x.data.dtype)),
        minimum=lambda x, y: Array(np.minimum(x.data, getattr(y, "data", y)), x.layout),
        maximum=lambda x, y, **_: Array(np.maximum(x.data, y), x.layout),
        abs=lambda x: Array(np.abs(x.data), x.layout),
        PropagateNan=tl.PropagateNan,
        join=lambda x, y: Array(np.stack((x.data, y.data), axis=-1)),
        split=lambda x: tuple(Array(each) for each in np.moveaxis(x.data, -1, 0)),
        load=load,
        store=store,
        inline_asm_elementwise=partial(inline_asm_elementwise, num_warps, shared),
        **shared.language(),
    )


def _range(*bounds):
    """A loop's counter is a number of the kernel's, as program_id is."""
    return (Array(np.int32(step)) for step in range(*map(operator.index, bounds)))


def _plain(function, language, known):
    """A jit function's Python, and that of those it calls, in another language."""
    namespace = function.fn.__globals__
    if id(namespace) not in known:
        mine = known[id(namespace)] = {
            **namespace,
            **dict.fromkeys(("gl", "tl"), language),
            "range": _range,
            **{
                name: getattr(language, name) for name in ("async_copy", "hopper", "thread_barrier")
            },
        }
        for name, value in namespace.items():
            if isinstance(value, (GluonJITFunction, InterpretedFunction)):
                mine[name] = _plain(value, language, known)
    fn = function.fn
    return FunctionType(fn.__code__, known[id(namespace)], fn.__name__, fn.__defaults__)


def _memory(tensor):
    """A tensor's elements as they lie in memory, which are side by side."""
    return tensor.as_strided((tensor.numel(),), (1,)).numpy()


def run(kernel, grid, num_warps, arguments):
    """Run every program of a kernel on CPU tensors, in place."""
    given = {
        name: _pointer(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    grid = grid if isinstance(grid, tuple) else (grid,)
    for program in np.ndindex(*grid):
        _plain(kernel, _language(program, grid, num_warps), {})(**given)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            memory = value.as_strided((value.numel(),), (1,))
            memory.copy_(torch.from_numpy(given[name].elements))


def _pointer(tensor):
    """To a tensor's elements as they lie in memory, side by side."""
    if tensor.dtype == torch.bfloat16:
        return Pointer(_memory(tensor.float()), dtype=BFLOAT16)
    return Pointer(_memory(tensor))


def emulate(monkeypatch):
    """Run the kernels here, and let the formulation be chosen without the hardware."""

    def launch(kernel, programs, tile, **arguments):
        run(kernel, programs, tile.num_warps, arguments)

    products = mma, mma_warpgroup, conv_warpgroup, input_grad_warpgroup, weight_grad_warpgroup
    for module in (*products, mma_peak, mma_unit, mma_unit_grad):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(below_triton, "runs", lambda *_: True)
