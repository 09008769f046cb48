"""Networks by name."""

import math
from collections.abc import Callable
from functools import partial

from tritonbnn.models.binarynet import binarynet
from tritonbnn.models.blocks import BinaryNetwork
from tritonbnn.models.reactnet import reactnet_a
from tritonbnn.models.resnet import resnet_18

MODELS: dict[str, Callable[..., BinaryNetwork]] = {
    "reactnet_a": reactnet_a,
    "reactnet_18": partial(resnet_18, rprelu=True),
    "birealnet_18": partial(resnet_18, rprelu=False),
    "binarynet": binarynet,
}


def build_model(
    name: str,
    *,
    num_classes: int = 1000,
    binary_weights: bool = True,
    width: float = 1.0,
    in_channels: int = 3,
    small_images: bool = False,
    fused: bool = True,
    plan: str = "auto",
) -> BinaryNetwork:
    """Build a network.

    ``binary_weights=False`` is the network of step 1: binary activations, real weights. Both have
    the same parameter names and shapes, so that step 2 loads step 1 strictly.

    Args:
        name: "reactnet_a", "reactnet_18", "birealnet_18", or "binarynet".
        num_classes: outputs of the head.
        binary_weights: whether the weights of the binary convolutions are binarised too.
        width: multiplies all channels; they are rounded to multiples of 8.
        in_channels: 1 or 3.
        small_images: a stem of stride 1 for images of about 32x32.
        fused: whether a unit is one Function; see :class:`~tritonbnn.nn.BinaryUnit`.
        plan: what that saves for backward; "recompute" is the least.

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes). H and W must be
        multiples of its ``size_multiple``.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels must be 1 or 3, not {in_channels}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, not {width}")
    return MODELS[name](
        num_classes=num_classes,
        binary_weights=binary_weights,
        width=width,
        in_channels=in_channels,
        small_images=small_images,
        fused=fused,
        plan=plan,
    )
