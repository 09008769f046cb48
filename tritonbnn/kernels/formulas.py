"""The elementwise formulas as one writes them in torch: what the fused kernels race against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]

_PIXELS = (0, 2, 3)


def plain_formulas(shortcut: str) -> dict[str, Callable[[Tensors], Any]]:
    """A function of named tensors for every elementwise operation, vectors as (1, C, 1, 1).

    Args:
        shortcut: of the unit: "identity", "repeat" or "pool".
    """

    def pre_activation(t: Tensors) -> Tensor:
        stream = t["stream"]
        if shortcut == "pool":
            stream = F.avg_pool2d(stream, 2)
        if shortcut == "repeat":
            stream = torch.cat((stream, stream), dim=1)
        return (t["a"] - t["mean"]) * t["scale"] + t["offset"] + stream + t["shift_mid"]

    def unit_forward(t: Tensors) -> Tensor:
        return F.prelu(pre_activation(t), t["slope"].flatten()) + t["shift_out"]

    def unit_activation_backward(t: Tensors) -> tuple[Tensor, ...]:
        u, grad = pre_activation(t), t["grad"]
        du = torch.where(u > 0, grad, grad * t["slope"])
        centred = t["a"] - t["mean"]
        parts = (du, du * centred, u.clamp(max=0) * grad, grad)
        return du, torch.stack([part.sum(_PIXELS) for part in parts])

    def sign_backward(t: Tensors) -> tuple[Tensor, Tensor]:
        ds = (2 - 2 * (t["x"] + t["shift_in"]).abs()).clamp(min=0) * t["grad"]
        skipped = t["residual"]
        if shortcut == "pool":
            skipped = (skipped / 4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if shortcut == "repeat":
            first, second = skipped.chunk(2, dim=1)
            skipped = first + second
        return ds + skipped, ds.sum(_PIXELS)

    return {
        "pack_signs": _sign,
        "sign_forward": _sign,
        "sign_backward": sign_backward,
        "rprelu_forward": _rprelu_forward,
        "rprelu_backward": _rprelu_backward,
        "channel_moments": _channel_moments,
        "unit_forward": unit_forward,
        "unit_activation_backward": unit_activation_backward,
        "unit_norm_backward": _unit_norm_backward,
    }


def _sign(t: Tensors) -> Tensor:
    return torch.where(t["x"] + t["shift_in"] >= 0, 1.0, -1.0).to(t["x"].dtype)


def _rprelu_forward(t: Tensors) -> Tensor:
    return F.prelu(t["x"] + t["shift_in"], t["slope"].flatten()) + t["shift_out"]


def _rprelu_backward(t: Tensors) -> tuple[Tensor, ...]:
    shifted, grad = t["x"] + t["shift_in"], t["grad"]
    dx = torch.where(shifted > 0, grad, grad * t["slope"])
    dslope = (shifted.clamp(max=0) * grad).sum(_PIXELS)
    return dx, dx.sum(_PIXELS), dslope, grad.sum(_PIXELS)


def _channel_moments(t: Tensors) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(t["a"].float(), dim=_PIXELS, correction=0)
    return mean, variance


def _unit_norm_backward(t: Tensors) -> Tensor:
    return t["scale"] * t["grad"] + t["slope"] * t["a"] + t["offset"]
