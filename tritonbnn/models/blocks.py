"""What the networks share: widths, stems, and the input sizes that they take."""

from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from tritonbnn.nn import BinaryConv2d, BinaryUnit
from tritonbnn.nn.ends import OrderedBatchNorm2d, OrderedConv2d, OrderedLinear

WIDTH_MULTIPLE = 8
IMAGE_SIZE, SMALL_IMAGE_SIZE = 224, 32  # what the networks are meant for, with each stem
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the recipes use


def scaled(channels: int, width: float) -> int:
    """``channels * width`` rounded to a multiple of 8.

    Raises:
        ValueError: no channels would be left.
    """
    result = round(channels * width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if result < 1:
        raise ValueError(f"width {width:g} leaves no channels of {channels}; use a larger width")
    return result


def check_widening(channels: int, out_channels: int, width: float) -> None:
    """Raise ValueError unless a block keeps or doubles its channels at this width."""
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"width {width:g} rounds a doubling of channels to {channels} and then {out_channels}: "
            "use a multiple of 0.25"
        )


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """A real convolution, padded, without bias, and its BatchNorm."""
    return nn.Sequential(
        OrderedConv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        ),
        OrderedBatchNorm2d(out_channels),
    )


def signed_layer(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    binary_weights: bool,
    pool: nn.Module | None = None,
) -> list[nn.Module]:
    """Sign, padded convolution, pooling and BatchNorm of a network without shortcuts."""
    padding = kernel_size // 2
    conv = BinaryConv2d(
        in_channels, out_channels, kernel_size, padding=padding, binary_weight=binary_weights
    )
    return [conv, *([pool] if pool else []), OrderedBatchNorm2d(out_channels)]


@fx.wrap  # in a traced graph it is one node, as a stand-in for images has no size
def checked_images(x: Tensor, channels: int, multiple: int) -> Tensor:
    """``x``, if it is (N, channels, H, W) with multiples of ``multiple``; else raise ValueError."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"images must have shape (N, {channels}, H, W), not {tuple(x.shape)}")
    if any(size == 0 or size % multiple for size in x.shape[2:]):
        raise ValueError(
            f"height and width must be multiples of {multiple}, not {x.shape[2]} x {x.shape[3]}"
        )
    return x


@fx.wrap
def checked_stream(x: Tensor, source: str) -> Tensor:
    """``x``, if it is a tensor, which a hook may have made something else; else raise TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"the network's {source} must return a tensor, not {type(x).__name__}")
    return x


class BinaryNetwork(nn.Module):
    """A stem, binary blocks, global average pooling, and a real linear head.

    It has the methods and attributes that timm's networks have, so that programs written for those
    can use it.

    Args:
        stem: from the image to the first residual stream.
        blocks: the body; a :class:`~tritonbnn.nn.Chain`, if units are to hand their signs on.
        in_channels: of the image.
        features: channels that reach the head.
        num_classes: outputs of the head.
        size_multiple: height and width of an image must be multiples of this.

    Attributes:
        num_classes: of the head; 0 where it has none.
        num_features: channels that reach the head.
        grad_checkpointing: whether backward computes each block again, which saves memory.
        feature_info: of the last stream of each resolution, a dict of ``num_chs``, ``reduction``
            and ``module``, as timm has it; empty where blocks are not of units.
        default_cfg: facts about the input: size, mean, standard deviation; names of ends.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        blocks: nn.Sequential,
        in_channels: int,
        features: int,
        num_classes: int,
        size_multiple: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = blocks
        self.fc: nn.Module = OrderedLinear(features, num_classes)
        self.in_channels = self.in_chans = in_channels
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = features
        self.size_multiple = size_multiple
        self.grad_checkpointing, self._pooled = False, True
        self.feature_info = _feature_info(stem, blocks)
        self.default_cfg = _input_facts(in_channels, num_classes, size_multiple)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) to logits (N, num_classes).

        Raises:
            ValueError: the image has the wrong channels, or a size that is not legal.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) to the last stream, (N, num_features, H', W')."""
        x = checked_images(x, self.in_channels, self.size_multiple)
        # once for all units, which keep it
        stream = checked_stream(self.stem(x), "stem")
        stream = stream.contiguous(memory_format=torch.channels_last)
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(stream)
        for block in self.blocks:
            stream = checkpoint(block, stream, use_reentrant=False)
        return stream

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stream to logits (N, num_classes).

        Args:
            x: (N, num_features, H', W').
            pre_logits: return what reaches the classifier, (N, num_features).
        """
        x = checked_stream(x, "blocks")
        x = x.mean(dim=(2, 3)) if self._pooled else x
        return x if pre_logits else self.fc(x)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer in the place of the old one.

        Args:
            num_classes: its outputs; 0 for none, so that the network returns features.
            global_pool: "avg"; "" to leave out pooling too, which needs ``num_classes=0``; None to
                leave that as it is.

        Raises:
            ValueError: another kind of pooling, or classes without pooling.
        """
        pooled = self._pooled if global_pool is None else global_pool == "avg"
        if global_pool not in (None, "avg", "") or (num_classes and not pooled):
            raise ValueError(
                f'global_pool must be "avg", or "" with num_classes=0, not {global_pool!r}'
                f" with num_classes={num_classes}"
            )
        like = next(self.stem.parameters())  # the old layer may have been no layer
        head = OrderedLinear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc = head.to(like.device, like.dtype).train(self.training)
        self.num_classes, self._pooled = num_classes, pooled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Have backward compute each block again, instead of keeping what it needs.

        BatchNorm's running averages then move twice a step, as they do in timm.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters lie how deep, for learning rates that depend on it."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


def _feature_info(stem: nn.Sequential, blocks: nn.Sequential) -> list[dict[str, Any]]:
    """The last stream of each resolution, the stem's if its resolution ends there."""
    streams: list[tuple[int, str, int]] = []
    reduction = _reduction(stem)
    for name, block in blocks.named_children():
        units = [m for m in block.modules() if isinstance(m, BinaryUnit)]
        if not units:
            continue
        if not streams:
            streams.append((reduction, "stem", units[0].in_channels))
        reduction *= prod(unit.stride for unit in units)
        streams.append((reduction, f"blocks.{name}", units[-1].out_channels))
    last = {reduction: (name, channels) for reduction, name, channels in streams}
    return [
        {"num_chs": channels, "reduction": reduction, "module": name}
        for reduction, (name, channels) in last.items()
    ]


def _reduction(stem: nn.Sequential) -> int:
    strides = (getattr(module, "stride", 1) for module in stem)
    return prod(stride if isinstance(stride, int) else stride[0] for stride in strides)


def _input_facts(in_channels: int, num_classes: int, multiple: int) -> dict[str, Any]:
    """In timm's words; 32 divides sizes in the networks for large images alone."""
    size = IMAGE_SIZE if multiple >= SMALL_IMAGE_SIZE else SMALL_IMAGE_SIZE
    return {
        "num_classes": num_classes,
        "input_size": (in_channels, size, size),
        "min_input_size": (in_channels, multiple, multiple),
        "pool_size": (size // multiple, size // multiple),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "first_conv": "stem.0",
        "classifier": "fc",
    }
