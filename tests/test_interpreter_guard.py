"""The guard on interpreted launches finds planted faults, and lets a right kernel pass."""

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterError

from tests.helpers import KERNEL_DEVICE
from tests.interpreter_guard import watch
from tritonbnn import kernels


@pytest.fixture
def launched(monkeypatch):
    return watch(monkeypatch)


def double(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=inside), mask=inside)


def load_past_the_end(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=at < size)


def store_past_the_end(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size))


def store_before_the_start(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at - 1, tl.load(x_ptr + at, mask=at < size), mask=at < size)


def programs_overlap(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)


def lanes_overlap(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at // 2, tl.load(x_ptr + at, mask=at < size), mask=at < size)


def load_what_another_stored(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y_ptr + at - 1, mask=(at > 0) & (at < size))
    tl.store(y_ptr + at, before, mask=at < size)


def store_what_others_loaded(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(y_ptr + size - 1)
    tl.store(y_ptr + at, first + tl.load(x_ptr + at, mask=at < size), mask=at < size)


def run(kernel, size=11):
    # of one piece of memory, so that what is outside of one tensor is not by chance in another
    memory = torch.arange(100.0)
    x, y = memory[20 : 20 + size], memory[50 : 50 + size]
    InterpretedFunction(kernel)[(3,)](x, y, size=size, BLOCK=4)
    return x, y


def test_a_right_kernel_passes(launched):
    x, y = run(double)
    assert torch.equal(y, 2 * x)
    assert launched == ["double"]


FAULTS = [
    (load_past_the_end, "loads outside: at byte 44 of 44 of x_ptr"),
    (store_past_the_end, "stores outside: at byte 44 of 44 of y_ptr"),
    (store_before_the_start, "stores outside: at byte 116 of 44 of x_ptr"),
    (programs_overlap, "stores to an element of y_ptr that another program stored"),
    (lanes_overlap, "stores twice at once to one element of y_ptr"),
    (load_what_another_stored, "loads an element of y_ptr that another program stored"),
    (store_what_others_loaded, "stores to an element of y_ptr that another program loaded"),
]


@pytest.mark.parametrize(("kernel", "message"), FAULTS, ids=[k.__name__ for k, _ in FAULTS])
def test_a_planted_fault_is_found(launched, kernel, message):
    with pytest.raises(InterpreterError, match=f"of {kernel.__name__} {message}"):
        run(kernel)


def test_tensors_that_overlap_are_one_span(launched):
    x = torch.arange(8.0)
    InterpretedFunction(double)[(1,)](x, x[2:6], size=4, BLOCK=4)
    assert x.tolist() == [0, 1, 0, 2, 4, 6, 6, 7]


@pytest.mark.skipif(KERNEL_DEVICE.type == "cuda", reason="kernels are not interpreted on a GPU")
def test_every_test_of_kernels_is_guarded(guarded_launches):
    kernels.pack_signs(torch.randn(5, 33))
    assert guarded_launches == ["_pack_kernel"]
