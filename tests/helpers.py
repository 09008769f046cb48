"""Comparisons and inputs that several tests share."""

import torch


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
    allowed = 2 * (eager.double() - truth).abs().max()
    floor = torch.finfo(result.dtype).eps * truth.abs().max()
    assert error <= allowed + floor, f"error {error:.3g} > 2 x eager's {allowed / 2:.3g}"


def activation(*shape, dtype=torch.float32, layout="contiguous", seed=0):
    """A random activation with exact zeros of both signs, in the memory layout named."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
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


def vectors(count, channels, seed=1):
    """``count`` random float32 vectors, one value per channel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator).mul_(0.5).unbind(0)


def plus_minus(*shape, seed=2):
    """Random signs, +1 and -1 in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()
