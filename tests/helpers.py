"""Comparisons and inputs that several tests share."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tritonbnn import kernels
from tritonbnn.kernels.problems import OPS, PLAN
from tritonbnn.kernels.truth import tolerance

KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

OF_BOTH_STEPS = [(op, True) for op in (*OPS, PLAN)] + [
    (op, False) for op in (*OPS, PLAN) if op.startswith(("unit", "channel"))
]
"""What there is to launch, and whether by binary weights: step 1 has real ones."""

INPUTS = [
    pytest.param((2, 32, 7, 7), torch.float32, "channels_last", id="ordinary"),
    pytest.param((2, 33, 5, 3), torch.bfloat16, "contiguous", id="odd"),
    pytest.param((2, 31, 1, 7), torch.float16, "strided", id="strided"),
    pytest.param((2, 96, 1, 1), torch.float32, "contiguous", id="one_pixel"),
    pytest.param((3, 1, 5, 3), torch.float32, "channels_last", id="one_channel"),
    pytest.param((5, 40), torch.bfloat16, "contiguous", id="matrix"),
]
"""Shape, dtype and layout of an activation."""


def device_of(launchers):
    """Where launchers run: kernels on a GPU if there is one, all others on the CPU."""
    return KERNEL_DEVICE if launchers is kernels else torch.device("cpu")


def assert_no_worse_than_eager(result, eager, truth):
    """Assert that a result errs at most twice as much as eager torch in the same dtype.

    Args:
        result: of the code under test, in the dtype under test.
        eager: plain torch's result for the same inputs, in the same dtype.
        truth: the same in float64.
    """
    assert result.shape == truth.shape
    assert truth.dtype == torch.float64
    result, eager, truth = result.cpu(), eager.cpu(), truth.cpu()
    if truth.numel() == 0:
        return
    error = (result.double() - truth).abs().max()
    allowed = tolerance(result.dtype, eager, truth)
    assert error <= allowed, f"error {error:.3g} where {allowed:.3g} is allowed"


def activation(*shape, dtype=torch.float32, layout="contiguous", seed=0):
    """A random activation with exact zeros of both signs, in the memory layout named.

    Multiples of 1/64, as the vectors are: their sum is exact in every dtype near 0, so that no
    rounding decides on which side of it a value lies.
    """
    x = gradient(*shape, seed=seed).mul_(64).round_().div_(64)
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::11] = -0.0
    x = x.to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def gradient(*shape, dtype=torch.float32, seed=5):
    """A random upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def vectors(count, channels, seed=1):
    """``count`` random float32 vectors of multiples of 1/64, one value per channel."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, channels, generator=generator)
    return values.mul_(32).round_().div_(64).unbind(0)


def plus_minus(*shape, seed=2):
    """Random signs, +1 and -1 in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()


def signs(weight):
    """+1 and -1, with sign(0) = +1."""
    return np.where(weight >= 0, 1, -1)


def flips(before, after):
    """The paper's sum of abs(sign - sign) / 2, layer by layer."""
    return [np.abs(signs(a) - signs(b)).sum() / 2 for a, b in zip(before, after, strict=True)]


def assert_runs_silently(code):
    """Assert that a process of its own runs the code and says nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def in_its_own_process(*words, **environ):
    """Python with these words, where kernels are not interpreted: what it said, and its code."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**kept, **environ},
        timeout=900,
        check=False,
    )
