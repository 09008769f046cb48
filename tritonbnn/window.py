"""A convolution's window, given as torch.nn's layers take it, and checked before anything runs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Size = int | Sequence[int]


class Window(NamedTuple):
    """What is convolved with a kernel of two dimensions, beside the kernel itself.

    Attributes:
        kernel_size: height and width.
        stride: down and to the right.
        padding: zeros on each side, above and below, left and right.
        extra: more zeros, below and on the right: "same" pads unevenly for an even kernel.
        dilation: the distance between the kernel's elements.
        groups: parts of the channels that are convolved separately.
        least: height and width that an image must have at least.
        packed: whether the launchers convolve packed signs by it: 1x1 or 3x3, padded to "same".
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    extra: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    least: tuple[int, int]
    packed: bool

    def check(self, height: int, width: int) -> None:
        """Raise ValueError if an image is smaller than the kernel, or has no pixels."""
        if height < self.least[0] or width < self.least[1]:
            raise ValueError(
                f"an image of {height} x {width} is too small for a kernel of "
                f"{_times(self.kernel_size)}, dilation {_times(self.dilation)} "
                f"and padding {_times(self.padding)}"
            )

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of what an image of ``size`` is convolved to."""
        sides = zip(size, *self[:5], strict=True)
        height, width = (
            (pixels + 2 * pad + more - step * (taps - 1) - 1) // stride + 1
            for pixels, taps, stride, pad, more, step in sides
        )
        return height, width


def window(
    kernel_size: Sequence[int],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Window:
    """The window of a kernel of two dimensions, from arguments as nn.Conv2d takes them.

    Raises:
        ValueError: an argument is not a number, or as many as there are dimensions, or out of
            range; an unknown word for ``padding``; "same" with a stride.
    """
    strides, steps = sizes("stride", stride, 2), sizes("dilation", dilation, 2)
    zeros, extra = _padding(kernel_size, strides, padding, steps)
    return padded_window(kernel_size, strides, zeros, extra, steps, groups)


def padded_window(
    kernel_size: Sequence[int],
    strides: Sequence[int],
    zeros: Sequence[int],
    extra: Sequence[int],
    steps: Sequence[int],
    groups: int,
) -> Window:
    """A window from its own attributes, two numbers each: what is found from them is found here."""
    height, width = kernel_size
    strides, zeros, extra, steps = map(_pair, (strides, zeros, extra, steps))
    sides = zip(kernel_size, zeros, extra, steps, strict=True)
    least = [step * (taps - 1) + 1 - 2 * pad - more for taps, pad, more, step in sides]
    packed = (
        height == width
        and height in (1, 3)
        and strides in ((1, 1), (2, 2))
        and zeros == (height // 2, height // 2)
        and extra == (0, 0)
        and (height == 1 or steps == (1, 1))
        and groups == 1
    )
    return Window(
        *((height, width), strides, zeros, extra, steps, groups),
        *((max(1, least[0]), max(1, least[1])), packed),
    )


def sizes(name: str, value: Size, dimensions: int, least: int = 1) -> tuple[int, ...]:
    """``value`` for each dimension.

    Raises:
        ValueError: it is neither an int nor one int for each dimension, or one is too small.
    """
    # a tuple is asked for first: an abstract class is slow to ask, and a layer's call comes here
    given = value if isinstance(value, (tuple, Sequence)) else (value,) * dimensions
    values = tuple(given)
    if len(values) != dimensions or not all(isinstance(v, int) and v >= least for v in values):
        several = f" or {dimensions} ints" if dimensions > 1 else ""
        raise ValueError(f"{name} must be an int{several}, at least {least}, not {value!r}")
    return values


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an int, at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int, at least 1, not {value!r}")


def check_layer(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Size | str,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> None:
    """Raise ValueError unless a layer can be built so."""
    for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
        check_count(name, count)
        check_count("groups", groups)
        if count % groups:
            raise ValueError(f"{name} must be a multiple of groups={groups}, not {count}")
    if padding_mode != "zeros":
        raise ValueError(
            f"padding_mode must be 'zeros', not {padding_mode!r}: pad the input with "
            "torch.nn.functional.pad before the layer, and give padding=0"
        )
    _padding(kernel_size, stride, padding, dilation)


def check_weight(weight: Tensor, channels: int, groups: int) -> None:
    """Raise ValueError unless ``weight`` is (O, channels / groups, kh, kw), O a multiple of groups.

    Args:
        weight: of the convolution.
        channels: of its input.
        groups: as given by the caller.
    """
    shape = tuple(weight.shape)
    fits = len(shape) == 4 and all(shape) and shape[1] * groups == channels
    if fits and shape[0] % groups == 0:
        return
    check_count("groups", groups)
    raise ValueError(
        f"weight must have shape (O, {channels} / groups, kh, kw) for an x of {channels} channels, "
        f"and O a multiple of groups={groups}, not {shape}"
    )


def _padding(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Size | str, dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros on each side, and extra ones behind the last row and column."""
    none = (0,) * len(kernel_size)
    if not isinstance(padding, str):
        return sizes("padding", padding, len(kernel_size), 0), none
    if padding == "valid":
        return none, none
    if padding != "same":
        raise ValueError(f"padding must be ints, 'same' or 'valid', not {padding!r}")
    if any(step != 1 for step in stride):
        raise ValueError(f"padding='same' needs stride 1, not {_times(stride)}")
    total = [step * (taps - 1) for taps, step in zip(kernel_size, dilation, strict=True)]
    return tuple(n // 2 for n in total), tuple(n % 2 for n in total)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _times(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))
