"""From a trained module to a packed network: signs become bits, and vectors are folded."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritonbnn.deploy.packed import Array, Packed, Unit, check
from tritonbnn.models.blocks import BinaryNetwork
from tritonbnn.models.resnet import DownsamplingUnit
from tritonbnn.nn import BinaryUnit, Chain
from tritonbnn.nn.ends import OrderedBatchNorm2d, OrderedConv2d, OrderedLinear

_CONVOLUTIONS = (nn.Conv2d, OrderedConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, OrderedBatchNorm2d)
_LINEARS = (nn.Linear, OrderedLinear)
_KNOWN = "only the layers of reactnet_a, reactnet_18 and birealnet_18 can be packed"


class FoldError(ValueError):
    """A module that cannot be packed. The message is one line that names it and the reason."""


def fold(
    model: nn.Module,
    *,
    classes: Sequence[str] | None = None,
    transform: dict[str, Any] | None = None,
    half_ends: bool = False,
) -> Packed:
    """The packed network of a module in eval mode.

    Args:
        model: a :class:`~tritonbnn.models.blocks.BinaryNetwork` whose blocks are binary units.
        classes: their names.
        transform: how an image becomes the input; see :class:`~tritonbnn.deploy.packed.Packed`.
        half_ends: whether stem and head are float16.

    Raises:
        FoldError: a module in it is unknown, in training mode, has real weights or hooks, or holds
            numbers that are not finite.
    """
    if not isinstance(model, BinaryNetwork) or type(model).forward is not BinaryNetwork.forward:
        raise FoldError(
            f"cannot pack a {type(model).__name__}: give the network of build_model that is in it"
        )
    for name, module in model.named_modules():
        _check_plain(name, module)
    ends = np.float16 if half_ends else np.float32
    weight, offset, stride, pools = _stem(model.stem)
    units = tuple(_unit(f"blocks.{name}", unit) for name, unit in _units(model.blocks))
    if not units:
        raise FoldError("the network has no binary unit")
    head: Any = model.fc
    if type(head) not in _LINEARS:
        raise FoldError(f"fc is a {type(head).__name__}: only a linear layer can be packed")
    bias = torch.zeros(len(head.weight)) if head.bias is None else head.bias
    packed = Packed(
        in_channels=model.in_channels,
        size_multiple=model.size_multiple,
        stem_weight=_half("stem", weight, ends),
        stem_offset=offset,
        stem_stride=stride,
        stem_pools=pools,
        units=units,
        head_weight=_half("fc", _wide(head.weight).numpy(), ends),
        head_offset=_vector("fc.bias", bias),
        classes=None if classes is None else tuple(classes),
        transform=transform,
    )
    check(packed)
    return packed


def _check_plain(name: str, module: nn.Module) -> None:
    name = name or "the network"
    if module.training:
        raise FoldError(f"{name} is in training mode: call model.eval() first")
    hooked = (module._forward_hooks, module._forward_pre_hooks, "forward" in module.__dict__)
    if any(hooked):
        raise FoldError(f"{name} has hooks or a forward of its own, which cannot be packed")
    parametrized = getattr(module, "parametrizations", None)
    if parametrized:
        raise FoldError(
            f"{name} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations"
        )
    for key, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and value.is_floating_point() and not value.isfinite().all():
            raise FoldError(f"{name}.{key} holds numbers that are not finite")


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, BinaryUnit]]:
    """All units in order, by their place below the blocks."""
    for name, child in module.named_children():
        place = f"{prefix}{name}"
        if type(child) in (BinaryUnit, DownsamplingUnit):
            yield place, child  # type: ignore[misc]
        elif type(child) in (nn.Sequential, Chain):
            yield from _units(child, f"{place}.")
        else:
            raise FoldError(f"blocks.{place} is a {type(child).__name__}: {_KNOWN}")


def _stem(stem: nn.Module) -> tuple[Array, Array, int, bool]:
    """Folded weight and offset, the stride, and whether a maximum follows."""
    modules = list(stem.children())
    kinds = [type(m).__name__ for m in modules]
    known = len(modules) in (2, 3) and isinstance(modules[0], nn.Conv2d)
    if not known or type(modules[0]) not in _CONVOLUTIONS or type(modules[1]) not in _NORMS:
        raise FoldError(f"the stem is {', '.join(kinds)}: {_KNOWN}")
    convolution: Any = modules[0]
    kernel = convolution.kernel_size[0]
    if (
        convolution.kernel_size != (kernel, kernel)
        or kernel not in (1, 3, 5, 7)
        or convolution.stride not in ((1, 1), (2, 2))
        or convolution.padding != (kernel // 2,) * 2
        or (convolution.dilation, convolution.groups) != ((1, 1), 1)
        or convolution.padding_mode != "zeros"
    ):
        raise FoldError(f"the stem's convolution cannot be packed: {convolution}")
    if len(modules) == 3 and not _is_known_pool(modules[2]):
        raise FoldError(f"the stem's {modules[2]} cannot be packed")
    weight, offset = _with_norm("stem", convolution, modules[1])
    return weight, offset, convolution.stride[0], len(modules) == 3


def _is_known_pool(pool: Any) -> bool:
    settings = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    found = tuple(getattr(pool, name, None) for name in settings)
    return type(pool) is nn.MaxPool2d and found == (3, 2, 1, 1, False, False)


def _with_norm(name: str, convolution: Any, norm: Any) -> tuple[Array, Array]:
    """A real convolution and its BatchNorm as one weight and one offset, in float64 until then."""
    gain, offset = _affine(name, norm)
    weight = _wide(convolution.weight) * gain.view(-1, 1, 1, 1)
    if convolution.bias is not None:
        offset = offset + gain * _wide(convolution.bias)
    return weight.numpy(), _vector(name, offset)


def _affine(name: str, norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in eval mode, (C,) float64 each."""
    if norm.running_mean is None or norm.running_var is None:
        raise FoldError(f"{name}: a BatchNorm without running averages cannot be packed")
    gain = (_wide(norm.running_var) + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * _wide(norm.weight)
    bias = torch.zeros_like(gain) if norm.bias is None else _wide(norm.bias)
    return gain, bias - gain * _wide(norm.running_mean)


def _unit(name: str, unit: BinaryUnit) -> Unit:
    if not unit.binary_weight:
        raise FoldError(
            f"{name} has real weights, as step 1 trains them: only a network of 1-bit weights,"
            " as step 2 trains it, can be packed"
        )
    if type(unit.bn) not in _NORMS:
        raise FoldError(f"{name}.bn is a {type(unit.bn).__name__}, which cannot be packed")
    out_channels, channels, kernel, _ = unit.weight.shape
    weight = _wide(unit.weight)
    gain, offset = _affine(name, unit.bn)
    if unit.shift_mid is not None:
        offset = offset + _wide(unit.shift_mid)
    bits = (weight >= 0).permute(0, 2, 3, 1).numpy()
    projection = projected = None
    shortcut = unit._shortcut_kind(unit.weight)
    if isinstance(unit, DownsamplingUnit):
        shortcut = "project"
        matrix, projected = _downsample(f"{name}.downsample", unit.downsample)
        projection = _vector(name, torch.from_numpy(matrix[:, :, 0, 0]))
    return Unit(
        channels=channels,
        out_channels=out_channels,
        kernel_size=kernel,
        stride=unit.stride,
        shortcut=shortcut,
        weight=np.packbits(bits, axis=-1, bitorder="little"),
        scale=_vector(name, gain * weight.abs().mean((1, 2, 3))),
        constant=_vector(name, offset),
        shift_in=_optional(name, unit.shift_in),
        slope=_optional(name, unit.slope),
        shift_out=_optional(name, unit.shift_out),
        projection=projection,
        offset=projected,
    )


def _downsample(name: str, modules: nn.Sequential) -> tuple[Array, Array]:
    kinds = tuple(type(m) for m in modules)
    known = len(kinds) == 3 and kinds[0] is nn.AvgPool2d
    if not (known and kinds[1] in _CONVOLUTIONS and kinds[2] in _NORMS):
        raise FoldError(f"{name} is {modules}, which cannot be packed")
    convolution: Any = modules[1]
    if convolution.kernel_size != (1, 1) or modules[0].kernel_size != 2:
        raise FoldError(f"{name} is {modules}, which cannot be packed")
    return _with_norm(name, convolution, modules[2])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _vector(name: str, values: Tensor) -> Array:
    return _rounded(name, _wide(values).numpy(), np.float32)


def _optional(name: str, values: Tensor | None) -> Array | None:
    return None if values is None else _vector(name, values)


def _half(name: str, values: Array, dtype: Any) -> Array:
    return _rounded(name, values, dtype)


def _rounded(name: str, values: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values.astype(dtype))
    if not np.isfinite(rounded).all():
        raise FoldError(f"{name} holds numbers beyond {np.dtype(dtype).name}'s")
    return rounded
