"""A weight that is stored as its bits: a tensor of +1 and -1, 32 of them to an int32 word."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonbnn import eager

_aten = torch.ops.aten


class PackedWeight(Tensor):
    """A weight (O, C, k, k) or (O, C) of signs that takes one bit a weight.

    To torch it is a tensor of +1 and -1 in channels_last strides, and may be an nn.Parameter: its
    gradient is an ordinary tensor. The binary layers read its bits as they are. Any other operation
    sees it unpacked into a new tensor. ``copy_`` into it takes signs, sign(0) = +1. What else
    would change it in place is refused.

    Args:
        packed: int32, (O, k, k, words) or (O, words), as :func:`tritonbnn.ops.pack_signs` packs.
        channels: C.
        dtype: that the tensor claims to have.
        alpha: (O,) of ones, if there is one to share.

    Attributes:
        packed: the bits.
        alpha: (O,) float32, the scale of each filter: 1.
    """

    packed: Tensor
    alpha: Tensor

    # else each look at its shape or dtype would take a detour of microseconds
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        channels: int,
        dtype: torch.dtype = torch.float32,
        alpha: Tensor | None = None,
    ) -> "PackedWeight":
        shape = _shape(packed, channels)
        filter_size = shape[1:].numel()
        taps = (step // packed.shape[-1] * channels for step in packed.stride()[1:-1])
        strides = (filter_size, 1, *taps)
        return Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=packed.device)

    def __init__(
        self,
        packed: Tensor,
        channels: int,
        dtype: torch.dtype = torch.float32,
        alpha: Tensor | None = None,
    ) -> None:
        self.packed = packed
        self.alpha = torch.ones(len(packed), device=packed.device) if alpha is None else alpha

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        """The signs of a weight (O, C, k, k) or (O, C)."""
        with torch.no_grad():
            return cls(eager.pack_signs(weight), weight.shape[1], weight.dtype)

    @property
    def rows(self) -> Tensor:
        """The bits as (rows, words), where a row is the C channels of a tap. A view."""
        return self.packed.view(-1, self.packed.shape[-1])

    def unpacked(self) -> Tensor:
        """A new ordinary tensor of +1 and -1, channels innermost in memory."""
        return eager.unpack_signs(self.packed, self.shape[1], self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.unpacked()!r})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed"], (self.shape[1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> "PackedWeight":
        return PackedWeight(inner["packed"], *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _LIKE:  # which look at shape and strides alone
            weight, *rest = args
            like = torch.empty_strided(
                weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
            )
            return function(like, *rest, **kwargs)
        own = _OWN.get(function)
        if own is not None and isinstance(args[0], PackedWeight):
            return own(*args, **kwargs)
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(given, PackedWeight):
                raise TypeError(
                    f"{function.__name__} cannot change packed weights, which are signs only: use"
                    " an optimiser that flips them, as tritonbnn.optim.Bop"
                )
        args, kwargs = pytree.tree_map_only(PackedWeight, PackedWeight.unpacked, (args, kwargs))
        return function(*args, **kwargs)


def plain(weight: Tensor) -> Tensor:
    """An ordinary tensor of a weight's numbers: itself, or what it unpacks to."""
    return weight.unpacked() if isinstance(weight, PackedWeight) else weight


def _shape(packed: Tensor, channels: int) -> torch.Size:
    return torch.Size((packed.shape[0], channels, *packed.shape[1:-1]))


def _detach(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(weight.packed, weight.shape[1], weight.dtype, weight.alpha)


def _clone(weight: PackedWeight, *, memory_format: Any = None) -> Tensor:
    if memory_format not in (None, torch.preserve_format):
        return weight.unpacked().contiguous(memory_format=memory_format)
    return PackedWeight(weight.packed.clone(), weight.shape[1], weight.dtype, weight.alpha)


def _convert(
    weight: PackedWeight,
    *,
    dtype: Any = None,
    device: Any = None,
    non_blocking: bool = False,
    **_: Any,
) -> PackedWeight:
    packed = weight.packed.to(device or weight.device, non_blocking=non_blocking, copy=True)
    return PackedWeight(packed, weight.shape[1], dtype or weight.dtype)


def _copy(weight: PackedWeight, source: Tensor, non_blocking: bool = False) -> PackedWeight:
    if isinstance(source, PackedWeight):
        weight.packed.copy_(source.packed)
    else:
        weight.packed.copy_(eager.pack_signs(source.expand(weight.shape)))
    return weight


_LIKE = {_aten.empty_like.default, _aten.zeros_like.default, _aten.full_like.default}
_OWN: dict[Any, Any] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _convert,
    _aten.copy_.default: _copy,
}
