"""Run a packed network on a GPU: torch for its real ends, a kernel or two for each binary unit.

A call of a shape that was seen before is one CUDA graph. Without a GPU the same kernels run in
Triton's interpreter, and as they come.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tritonbnn import caches
from tritonbnn.cli import UserError
from tritonbnn.compute import PRECISIONS
from tritonbnn.deploy.engine import BaseEngine
from tritonbnn.deploy.graphs import Graphs
from tritonbnn.deploy.order import byte_table
from tritonbnn.deploy.packed import Array, Packed, Unit, bit_words, without_spare_bits
from tritonbnn.kernels.folded import FoldedUnit
from tritonbnn.kernels.pack import pack_signs
from tritonbnn.kernels.targets import target_of
from tritonbnn.layout import channels_last


class GpuNetwork:
    """A network of torch's operators and of kernels, on any device that these run on.

    Args:
        packed: checked.
        device: of its tensors.
        dtype: of the stream.
    """

    def __init__(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> None:
        def held(array: Array) -> Tensor:
            return torch.from_numpy(array.astype(np.float32)).to(device)

        self.device, self.dtype = device, dtype
        self._stem_weight = channels_last(held(packed.stem_weight).to(dtype))
        self._stem_offset = held(packed.stem_offset).to(dtype)
        self._stem_stride, self._stem_pools = packed.stem_stride, packed.stem_pools
        self._head = held(packed.head_weight), held(packed.head_offset)
        table = byte_table(packed)
        self._table = None if table is None else held(table)
        shift = packed.units[0].shift_in
        self._first_shift = None if shift is None else held(shift)
        following = (*packed.units[1:], None)
        pairs = zip(packed.units, following, strict=True)
        self._units = [_folded(unit, after, device) for unit, after in pairs]
        self._projections = [_projection(unit, device, dtype) for unit in packed.units]

    @property
    def weight_bytes(self) -> int:
        """Of the network's tensors."""
        ends = (self._stem_weight, self._stem_offset, *self._head, self._table, self._first_shift)
        held = [tensor for tensor in ends if tensor is not None]
        held += [tensor for unit in self._units for tensor in unit.tensors()]
        held += [tensor for pair in self._projections if pair is not None for tensor in pair]
        return sum(tensor.nbytes for tensor in held)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) float32.

        Args:
            images: (N, C, H, W) on the device, uint8 or the stream's dtype; at least one.

        Raises:
            ValueError: the sizes do not go through the network.
        """
        if images.dtype == torch.uint8:
            images = self._normalised(images)
        window = {"stride": self._stem_stride, "padding": self._stem_weight.shape[2] // 2}
        images = channels_last(images.to(self.dtype))
        x = F.conv2d(images, self._stem_weight, self._stem_offset, **window)
        if self._stem_pools:
            x = F.max_pool2d(x, 3, 2, 1)
        x = channels_last(x)
        signs = pack_signs(x, self._first_shift)
        for unit, projection in zip(self._units, self._projections, strict=True):
            if unit.stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
                raise ValueError("images of this size do not go through this network")
            if projection is not None:
                x = channels_last(F.conv2d(F.avg_pool2d(x, 2), *projection))
            x, signs = unit(signs, x)
        logits = F.linear(x.mean((2, 3), dtype=torch.float32), *self._head)
        if self._stem_pools:  # a maximum loses -inf; any other such number has come through
            logits += 0 * images.sum((1, 2, 3), dtype=torch.float32)[:, None]
        return logits

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Pixels as the transform makes them, by a table: on every machine the same numbers."""
        assert self._table is not None
        rows = [row[pixels[:, channel].int()] for channel, row in enumerate(self._table)]
        return torch.stack(rows, dim=1)


class GpuEngine(BaseEngine):
    """A packed network on a device. Several threads of a program may use it, one after another.

    Args:
        packed: the network.
        device: a GPU; or a CPU, where kernels are interpreted.
        precision: "fp32", "bf16" or "fp16", of the stream between units. Signs and sums of them are
            exact in each.

    Raises:
        ValueError: there is no such precision.
        tritonbnn.cli.UserError: the GPU is too old for the kernels.
    """

    def __init__(self, packed: Packed, device: torch.device, precision: str = "fp32") -> None:
        super().__init__(packed)
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
        self.precision, self.device = precision, device
        target_of(device)  # which raises
        self._network = GpuNetwork(packed, device, PRECISIONS[precision])
        self._graphs = Graphs(self._network)
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Who does the work: "Triton" with the GPU's name."""
        if self.device.type != "cuda":
            return "Triton, interpreted"
        return f"Triton, {torch.cuda.get_device_name(self.device)}"

    def __call__(self, images: Any) -> Any:
        """Logits (N, classes) float32, from images (N, C, H, W), as the CPU's engine.

        A tensor of any device is answered there, and an array by an array.
        """
        if isinstance(images, Tensor):
            self.check_shape(images.shape)
            pixels, floats = images.dtype == torch.uint8, images.is_floating_point()
            self.check_numbers(images.dtype, pixels=pixels, floats=floats)
            return self._logits(images.detach()).to(images.device)
        array = self.as_numbers(np.asarray(images))
        if not array.flags.writeable:
            array = array.copy()  # torch warns of an array that must not be written
        return self._logits(torch.from_numpy(array)).cpu().numpy()

    def memory(self) -> dict[str, int]:
        """Bytes that the network holds: weights as they are run, and what its graphs keep."""
        return {"weights": self._network.weight_bytes, "scratch": self._graphs.bytes_kept}

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.empty((0, len(self.packed.head_weight)), device=self.device)
        # Where the lock is given back all is done, so that a graph's memory has one reader.
        with self._lock, _on(self.device), torch.autocast(self.device.type, enabled=False):
            logits = self._graphs.logits(images)
            finite = bool(logits.isfinite().all())
        if not finite:
            self._refuse(images)
        return logits

    def _refuse(self, images: Tensor) -> None:
        """Say what made an answer that is not finite."""
        if images.is_floating_point():
            bad = (~images.float().isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                raise ValueError(f"image {int(bad[0])} holds numbers that are not finite")
        raise ValueError(
            f"the network's numbers go beyond those of {self.precision}: give smaller ones,"
            " or another precision"
        )


def place(name: str) -> torch.device:
    """The GPU of a name, with a folder where Triton can keep what it compiles.

    Args:
        name: cuda or cuda:N.

    Raises:
        UserError: there is no such device.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda" or (":" in name and not number.isdecimal()):
        raise UserError(f"unknown device {name!r}: use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r}, but torch finds no CUDA device: use device='cpu'")
    index = int(number) if number else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no {name}, only {torch.cuda.device_count()} GPUs: use another")
    caches.prepare(caches.TRITON)
    return torch.device("cuda", index)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _folded(unit: Unit, following: Unit | None, device: torch.device) -> FoldedUnit:
    """A unit's tensors; a projecting shortcut is made before it, and then is added as it is."""

    def held(array: Array) -> Tensor:
        return torch.from_numpy(array.copy()).to(device)

    def optional(array: Array | None) -> Tensor | None:
        return None if array is None else held(array)

    words = bit_words(without_spare_bits(unit.weight, unit.channels))
    return FoldedUnit(
        weight=held(words.view(np.int32)),
        channels=unit.channels,
        stride=unit.stride,
        shortcut="identity" if unit.shortcut == "project" else unit.shortcut,
        scale=held(unit.scale),
        constant=held(unit.constant),
        slope=optional(unit.slope),
        shift_out=optional(unit.shift_out),
        next_shift=None if following is None else optional(following.shift_in),
        pack=following is not None,
    )


def _projection(
    unit: Unit, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Weight and offset of a shortcut that projects."""
    if unit.projection is None or unit.offset is None:
        return None
    weight = torch.from_numpy(unit.projection[:, :, None, None].copy())
    offset = torch.from_numpy(unit.offset.copy())
    return channels_last(weight.to(device, dtype)), offset.to(device, dtype)
