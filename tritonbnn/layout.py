"""Memory layout: torch's NCHW shapes in channels_last memory, and the flat (pixels, C) view."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels innermost in memory, copied only when they are not.

    Args:
        x: (N, C, H, W), or (M, C), of any dtype and strides.
    """
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def empty_channels_last(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in channels_last memory."""
    _, c, h, w = shape
    # torch.empty is slow to find the strides of a memory format
    return torch.empty_strided(shape, (h * w * c, 1, w * c, c), dtype=dtype, device=device)


def empty_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of ``x``'s shape, (N, C, H, W) or (M, C), channels innermost."""
    memory = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=memory)


def flat_pixels(x: Tensor) -> Tensor:
    """View (N, C, H, W) in channels_last memory, or (M, C), as (pixels, C); never copies."""
    if x.dim() == 2:
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h * w, c)


def from_flat(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`flat_pixels`: view (pixels, C) as ``shape``, channels innermost."""
    if len(shape) == 2:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch takes ``x`` to be in channels_last memory, by its strides.

    ``is_contiguous`` cannot tell where there is one channel or one pixel: such a tensor passes for
    both formats. torch's own convolutions look at the strides then, and so does this.

    Args:
        x: any shape; False where there are not four dimensions.
    """
    if x.dim() != 4:
        return False
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last != x.is_contiguous():
        return last
    strides, sizes = x.stride(), x.shape
    least = 0
    for d in (1, 3, 2, 0):  # from the innermost of channels_last memory outwards
        if sizes[d] == 0 or strides[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:  # (N, 1, 1, 1) is taken to be contiguous
            return False
        least = strides[d] * sizes[d]
    return True


def in_format_of(y: Tensor, *operands: Tensor) -> Tensor:
    """``y`` in the memory format that torch's convolutions return: its operands'.

    Args:
        y: a result, densely packed.
        operands: it is channels_last where one of these is, else contiguous.
    """
    if y.dim() != 4:
        return y
    last = any(map(is_channels_last, operands))
    if is_channels_last(y) == last:
        return y
    # not contiguous(), which keeps the strides of one pixel; and not copy_() to an empty tensor,
    # through which torch.compile loses the gradient of a Function's result
    memory = torch.channels_last if last else torch.contiguous_format
    return y.clone(memory_format=memory)


def laid_out_as(grad: Tensor | None, operand: Tensor) -> Tensor | None:
    """``grad``, if there is one, in the memory layout of the tensor that it is the gradient to.

    So torch's own layers return gradients. DistributedDataParallel copies any other once more.
    """
    if grad is None or grad.stride() == operand.stride():
        return grad
    result = torch.empty_like(operand, dtype=grad.dtype)
    return grad if result.stride() == grad.stride() else result.copy_(grad)
