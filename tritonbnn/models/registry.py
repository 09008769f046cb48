"""Networks by name."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonbnn.models import alexnet, reactnet, resnet
from tritonbnn.models.binarynet import CHANNELS, HIDDEN, binarynet
from tritonbnn.models.blocks import WIDTH_MULTIPLE, BinaryNetwork
from tritonbnn.models.reactnet import reactnet_a
from tritonbnn.models.resnet import resnet_18

MODELS: dict[str, Callable[..., BinaryNetwork]] = {
    "reactnet_a": reactnet_a,
    "reactnet_18": partial(resnet_18, rprelu=True),
    "birealnet_18": partial(resnet_18, rprelu=False),
    "binarynet": binarynet,
    "binary_alexnet": partial(alexnet.alexnet, "binary_alexnet"),
    "xnornet": partial(alexnet.alexnet, "xnornet"),
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
        name: a key of ``MODELS``.
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


def network_of_weights(state: dict[str, Tensor], *, small_images: bool) -> dict[str, Any]:
    """What :func:`build_model` was given for the network of a state dict, by its shapes.

    Args:
        state: by our names.
        small_images: whether a ReActNet-A is for small images. Its shapes do not tell.

    Raises:
        ValueError: it is of another network.
    """
    first, head = state.get("stem.0.weight"), state.get("fc.weight")
    if first is None or first.dim() != 4 or head is None or head.dim() != 2:
        names = ", ".join(name[:40] for name in list(state)[:3])
        raise ValueError(f"not the weights of a network of tritonbnn or AdamBNN, but of {names}")
    if "blocks.0.0.weight" in state:
        name, narrow, wide = "reactnet_a", reactnet.STEM_CHANNELS, reactnet.BLOCKS[-1][0]
    elif "blocks.0.bn.weight" in state:
        name = "reactnet_18" if "blocks.0.slope" in state else "birealnet_18"
        narrow, wide, small_images = resnet.STAGES[0], resnet.STAGES[-1], first.shape[2] == 3
    elif "blocks.0.weight" in state and state["blocks.0.weight"].shape[2:] == (5, 5):
        name = "xnornet" if "stem.4.weight" in state else "binary_alexnet"
        narrow, wide = alexnet.STEM_CHANNELS[name], alexnet.HIDDEN
        small_images = first.shape[2] == 3
    else:
        name, narrow, wide, small_images = "binarynet", CHANNELS, HIDDEN, True
    network: dict[str, Any] = {
        "name": name,
        "num_classes": head.shape[0],
        "in_channels": first.shape[1],
        "small_images": small_images,
    }
    unlike = ""
    for width in _widths(narrow, first.shape[0], wide, head.shape[1]):
        network["width"] = width
        other = _first_difference(state, network)
        if other is None:
            return network
        unlike = unlike or other
    raise ValueError(f"not the weights of a {name} of tritonbnn: see {unlike or 'fc.weight'}")


def _widths(narrow: int, stem: int, wide: int, features: int) -> Iterator[float]:
    """Widths that round ``narrow`` and ``wide`` channels to ``stem`` and ``features``."""
    for halves in sorted(range(-WIDTH_MULTIPLE, WIDTH_MULTIPLE + 1), key=abs):
        width = (features + halves / 2) / wide
        rounded = [round(c * width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE for c in (narrow, wide)]
        if rounded == [stem, features]:
            yield width


def _first_difference(state: dict[str, Tensor], network: dict[str, Any]) -> str | None:
    """The first name whose shape is not that of the network, or None."""
    with torch.device("meta"):  # shapes alone: a head of a million features would fill the memory
        wanted = build_model(**network).state_dict()
    for key in {**wanted, **state}:
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape:
            return key
    return None
