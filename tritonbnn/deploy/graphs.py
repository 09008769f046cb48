"""Calls of a network as CUDA graphs: one launch for all its kernels, for each shape of images."""

import logging
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from tritonbnn.kernels.library import contract
from tritonbnn.recorder import Recorder

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16
"""Shapes whose graphs are kept: the one that was not used for longest goes first."""


class Network(Protocol):
    """What is called.

    Attributes:
        device: of its tensors.
        dtype: of images that are no bytes.
    """

    device: torch.device
    dtype: torch.dtype

    def logits(self, images: Tensor) -> Tensor:
        """Of images on the device, uint8 or ``dtype``, in channels_last memory."""


class Graphs:
    """Calls of a network. The first of a shape runs as it comes, and later ones as one graph.

    Args:
        network: what is called.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._seen: OrderedDict[Any, CapturedCall | None] = OrderedDict()
        self._recorder: Recorder | None = None
        self._captures = network.device.type == "cuda"
        self.bytes_kept = 0

    def logits(self, images: Tensor) -> Tensor:
        """Logits, in memory that no later call writes to.

        Args:
            images: (N, C, H, W), uint8 or floats, on any device; at least one.
        """
        network = self._network
        dtype = torch.uint8 if images.dtype == torch.uint8 else network.dtype
        key = (images.shape, dtype)
        known = key in self._seen
        captured = self._seen.pop(key, None)
        if known and captured is None and self._captures:
            captured = self._capture(images, dtype)
        if captured is not None:
            logits = captured(images)
        else:
            placed = images.to(network.device, dtype, non_blocking=True)
            with contract():
                logits = network.logits(placed.contiguous(memory_format=torch.channels_last))
        self._seen[key] = captured  # not of a shape that was refused
        if len(self._seen) > MOST_GRAPHS:
            self._seen.popitem(last=False)
        return logits

    def _capture(self, images: Tensor, dtype: torch.dtype) -> "CapturedCall | None":
        if self._recorder is None:
            self._recorder = Recorder(self._network.device)
        torch.cuda.empty_cache()  # as a capture begins
        before = torch.cuda.memory_reserved(self._network.device)
        try:
            captured = CapturedCall(self._network, images.shape, dtype, self._recorder)
        except RuntimeError as error:  # a library's operator that no graph can hold, or no memory
            said = str(error).strip().partition("\n")[0]
            logger.warning("packed networks run without a CUDA graph: %s", said)
            self._captures = False
            return None
        self.bytes_kept += max(0, torch.cuda.memory_reserved(self._network.device) - before)
        return captured


class CapturedCall:
    """A network's kernels for images of one shape, in one graph.

    Args:
        network: which has run for such images before, so that all is compiled.
        shape: of the images.
        dtype: uint8 or the stream's.
        recorder: of all of the network's graphs.
    """

    def __init__(
        self, network: Network, shape: torch.Size, dtype: torch.dtype, recorder: Recorder
    ) -> None:
        images = torch.zeros(shape, dtype=dtype, device=network.device)
        self._network = network
        self._images = images.contiguous(memory_format=torch.channels_last)
        with recorder.aside():
            self._work()
        self._replay = recorder.record(self._work)

    def _work(self) -> None:
        with contract():
            self._logits = self._network.logits(self._images)

    def __call__(self, images: Tensor) -> Tensor:
        self._images.copy_(images, non_blocking=True)
        self._replay()
        return self._logits.clone()
