"""The launchers' contracts in torch, packed bits included, for machines without a GPU.

Every function here has a twin of the same name and signature in ``tritonbnn.kernels``; tests hold
the two together. Activations have shape (N, C, H, W) in channels_last memory, or (M, C). Packed
signs are int32, channels innermost: (N, H, W, words), (M, words), and (O, kh, kw, words) for a
weight, ordered as :mod:`tritonbnn.bits` says. sign(0) = +1, for -0.0 too.

Sums run in float32, and in float64 for float64 input: the mode in which whole networks are
compared with other code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.layout import channels_last, empty_channels_last, flat_pixels, from_flat

# Eight bytes of 0 or 1, read as one int64 and multiplied by this, leave byte i on bit 56 + i.
_GATHER_BYTES = 0x0102040810204080


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """``x + shift`` in the accumulator's dtype, as (pixels, C)."""
    flat = flat_pixels(channels_last(x))
    flat = flat.to(_accumulator(x.dtype))
    return flat if shift is None else flat + shift


def _pack_rows(positive: Tensor) -> Tensor:
    """Pack (rows, C) booleans into (rows, words) int32."""
    channels = positive.shape[1]
    lanes = words(channels) * WORD_BITS
    if lanes != channels:
        positive = F.pad(positive, (0, lanes - channels))
    octets = positive.contiguous().view(torch.uint8).view(torch.int64)
    packed = (octets * _GATHER_BYTES).view(torch.uint8)[:, 7::8]
    # A clone, because an empty slice counts as contiguous and keeps its odd offset.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the eight signs that a byte holds, lowest bit first."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    return (byte >> torch.arange(8, device=device) & 1).to(dtype).mul_(2).sub_(1)


def _unpack_rows(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Unpack (rows, words) int32 into (rows, channels) of +1 and -1."""
    rows = packed.shape[0]
    octets = packed.contiguous().view(torch.uint8).to(torch.int32)
    signs = F.embedding(octets.view(-1), _sign_table(dtype, packed.device))
    return signs.view(rows, packed.shape[1] * WORD_BITS)[:, :channels]


def pack_signs(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Pack the signs of ``x + shift``: a bit is 1 iff the sum, in float32, is >= 0.

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift: (C,), or None for no shift.

    Returns:
        int32, (N, H, W, words) or (M, words), contiguous.
    """
    packed = _pack_rows(_shifted(x, shift) >= 0)
    if x.dim() == 2:
        return packed
    n, _, h, w = x.shape
    return packed.view(n, h, w, packed.shape[1])


def unpack_signs(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_signs`: +1 and -1 in ``dtype``.

    Args:
        packed: int32, (N, H, W, words) or (M, words).
        channels: C, the true number of channels.
        dtype: of the result.

    Returns:
        (N, C, H, W) in channels_last memory, or (M, C).
    """
    rows = _unpack_rows(packed.reshape(-1, packed.shape[-1]), channels, dtype).contiguous()
    if packed.dim() == 2:
        return rows
    n, h, w, _ = packed.shape
    return from_flat(rows, (n, channels, h, w))


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight's signs, and its scale alpha_o = mean over (I, kh, kw) of abs(w) (AdamBNN 1.3).

    Args:
        weight: (O, I, kh, kw) or (O, I), floating point, any strides.

    Returns:
        The packed signs, int32 (O, kh, kw, words) or (O, words), and alpha, (O,) float32
        (float64 for a float64 weight).
    """
    alpha = weight.abs().mean(dim=tuple(range(1, weight.dim())), dtype=_accumulator(weight.dtype))
    return pack_signs(weight), alpha


def packed_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The exact product of two matrices of signs, a @ b^T.

    Args:
        a: int32 (M, words(k)), packed signs.
        b: int32 (N, words(k)), packed signs.
        k: the number of signs in a row.

    Returns:
        int32 (M, N), each entry in [-k, k].
    """
    # Sums of +-1 are exact in float32 up to k = 2^24.
    dtype = torch.float32 if k <= 2**24 else torch.float64
    with torch.autocast(a.device.type, enabled=False):
        return (_unpack_rows(a, k, dtype) @ _unpack_rows(b, k, dtype).T).to(torch.int32)


def conv_packed(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve signs with signs; zero padding comes after the sign, so it adds nothing.

    Args:
        x: int32 (N, H, W, words), packed signs of the input.
        weight: int32 (O, kh, kw, words), packed signs of the weight.
        alpha: (O,), a scale per output channel, applied in float32; None for the bare integers.
        channels: C, the true number of input channels.
        stride: 1 or 2.
        padding: kh // 2.
        dtype: of the result. An integer dtype must hold +-C kh kw.

    Returns:
        (N, O, H', W') in channels_last memory.
    """
    acc = _accumulator(dtype)
    real = unpack_signs(weight, channels, acc)
    y = _convolution(unpack_signs(x, channels, acc), real, stride, padding)
    if alpha is not None:
        flat_pixels(y).mul_(alpha)
    return y.to(dtype)


def conv_real(
    x: Tensor, weight: Tensor, *, stride: int, padding: int, dtype: torch.dtype
) -> Tensor:
    """Convolve signs with a real weight (step 1 of the two-step schedule).

    Args:
        x: int32 (N, H, W, words(C)), packed signs of the input.
        weight: (O, C, kh, kw), floating point; rounded to ``dtype`` before the product.
        stride: 1 or 2.
        padding: kh // 2.
        dtype: of the result.

    Returns:
        (N, O, H', W') in channels_last memory.
    """
    acc = _accumulator(dtype)
    signs = unpack_signs(x, weight.shape[1], acc)
    return _convolution(signs, weight.to(dtype).to(acc), stride, padding).to(dtype)


def _convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """conv2d in the operands' own dtype: autocast would round the integers of the result."""
    with torch.autocast(x.device.type, enabled=False):
        return channels_last(F.conv2d(x, weight, stride=stride, padding=padding))


def conv_input_grad(
    grad: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    *,
    channels: int,
    height: int,
    width: int,
    stride: int,
    padding: int,
) -> Tensor:
    """The gradient of a binary convolution to its +-1 input.

    Args:
        grad: (N, O, H', W'), the gradient to the output.
        weight: packed signs, int32 (O, kh, kw, words), with ``alpha``; or a real (O, C, kh, kw)
            without.
        alpha: (O,), the scale per output channel, or None for a real weight.
        channels: C.
        height: H of the input.
        width: W of the input.
        stride: 1 or 2.
        padding: kh // 2.

    Returns:
        (N, C, H, W) in ``grad``'s dtype and channels_last memory.
    """
    acc = _accumulator(grad.dtype)
    if alpha is None:
        real = weight.to(grad.dtype).to(acc)
    else:
        real = unpack_signs(weight, channels, acc) * alpha.view(-1, 1, 1, 1)
    like = empty_channels_last((grad.shape[0], channels, height, width), acc, grad.device)
    mask = [True, False, False]
    return _convolution_backward(grad.to(acc), like, real, stride, padding, mask)[0].to(grad.dtype)


def conv_weight_grad(
    grad: Tensor, x: Tensor, *, channels: int, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The gradient of a binary convolution to its weight: signs correlated with ``grad``.

    No alpha enters, and no mask (AdamBNN 1.3): the caller applies the clip's mask.

    Args:
        grad: (N, O, H', W'), the gradient to the output.
        x: int32 (N, H, W, words), packed signs of the input.
        channels: C.
        kernel_size: kh = kw.
        stride: 1 or 2.
        padding: kh // 2.

    Returns:
        (O, C, kh, kw), float32 (float64 for a float64 ``grad``), in channels_last memory.
    """
    acc = _accumulator(grad.dtype)
    shape = (grad.shape[1], channels, kernel_size, kernel_size)
    like = empty_channels_last(shape, acc, grad.device)
    signs = unpack_signs(x, channels, acc)
    mask = [False, True, False]
    weight_grad = _convolution_backward(grad.to(acc), signs, like, stride, padding, mask)[1]
    return channels_last(weight_grad)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    s, p = [stride, stride], [padding, padding]
    return torch.ops.aten.convolution_backward(
        channels_last(grad), x, weight, None, s, p, [1, 1], False, [0, 0], 1, mask
    )


def sign_forward(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """sign(x + shift) as +1 and -1 in ``x``'s dtype.

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift: (C,), or None for no shift.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.
    """
    positive = _shifted(x, shift) >= 0
    return from_flat(positive.to(x.dtype).mul_(2).sub_(1), tuple(x.shape))


def sign_backward(
    grad: Tensor, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped quadratic's pseudo-gradient (AdamBNN 1.2): slope max(0, 2 - 2 abs(x + shift)).

    The slope is computed again from ``x``, which costs less than storing it.

    Args:
        grad: the gradient to the signs, of ``x``'s shape.
        x: (N, C, H, W) or (M, C), the input of the sign.
        shift: (C,), or None for no shift.
        residual: of ``x``'s shape: a gradient that reaches ``x`` by another way, added in the
            same pass; or None.

    Returns:
        The gradient to ``x``, slope * grad + residual, in ``x``'s dtype; and the gradient to the
        shift, sum of slope * grad, (C,) float32 (float64 for float64 ``x``).
    """
    slope = _shifted(x, shift).abs().mul_(-2).add_(2).clamp_(min=0)
    dx = slope.mul_(flat_pixels(channels_last(grad)))
    dshift = dx.sum(0)
    if residual is not None:
        dx = dx + flat_pixels(channels_last(residual))
    return from_flat(dx.to(x.dtype), tuple(x.shape)), dshift


def rprelu_forward(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    """PReLU(x + shift_in) + shift_out, slopes and shifts per channel (ReActNet, 2003.03488).

    Args:
        x: (N, C, H, W) or (M, C), floating point.
        shift_in: (C,), added before the PReLU.
        slope: (C,), the PReLU's slope where x + shift_in <= 0.
        shift_out: (C,), added after it.

    Returns:
        The shape and dtype of ``x``, channels innermost in memory.
    """
    t = _shifted(x, shift_in)
    z = torch.where(t > 0, t, t * slope).add_(shift_out)
    return from_flat(z.to(x.dtype), tuple(x.shape))


def rprelu_backward(
    grad: Tensor, x: Tensor, shift_in: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients of :func:`rprelu_forward` from one pass over ``grad`` and ``x``.

    Args:
        grad: the gradient to the output, of ``x``'s shape.
        x: the input of the forward pass.
        shift_in: (C,).
        slope: (C,).

    Returns:
        The gradients to ``x`` (in its dtype), ``shift_in``, ``slope`` and ``shift_out``; the last
        three (C,) float32 (float64 for float64 ``x``).
    """
    t = _shifted(x, shift_in)
    g = flat_pixels(channels_last(grad)).to(t.dtype)
    dx = torch.where(t > 0, g, g * slope)
    dslope = t.clamp_(max=0).mul_(g).sum(0)
    return from_flat(dx.to(x.dtype), tuple(x.shape)), dx.sum(0), dslope, g.sum(0)
