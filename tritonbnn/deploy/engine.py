"""Run a packed network on a CPU, with numpy and safetensors alone."""

import logging
import sys
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tritonbnn.deploy import file
from tritonbnn.deploy.native import NativeNetwork, NotFiniteError, default_threads
from tritonbnn.deploy.order import byte_table
from tritonbnn.deploy.packed import Array, Packed
from tritonbnn.deploy.plain import PlainNetwork

logger = logging.getLogger(__name__)

_FLOATS = (np.float16, np.float32, np.float64)
_MOST_THREADS = 1024


class Prediction(NamedTuple):
    """What :meth:`Engine.predict` says of N images.

    Attributes:
        classes: the name of each image's likeliest class; its number as text where the file has no
            names.
        indices: (N,) int64, the same as numbers.
        probabilities: (N, classes) float32.
    """

    classes: list[str]
    indices: Array
    probabilities: Array


class Engine:
    """A packed network that is ready to run. Several threads of a program may use it at once.

    Args:
        packed: the network.
        threads: of a call; None for as many as torch uses, or as there are processors.

    Attributes:
        packed: the network.
        classes: names of the classes, or None.
        transform: how an image becomes the input, or None.
        threads: of a call.
    """

    def __init__(self, packed: Packed, threads: int | None = None) -> None:
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise ValueError(f"threads must be between 1 and {_MOST_THREADS}, not {threads}")
        self.packed = packed
        self.classes = packed.classes
        self.transform = packed.transform
        self.threads = threads
        self._table = byte_table(packed)
        self._network: NativeNetwork | PlainNetwork
        try:
            self._network = NativeNetwork(packed)
        except RuntimeError as error:
            logger.warning("packed networks run in numpy, which is slow: %s", error)
            self._network = PlainNetwork(packed)

    @property
    def name(self) -> str:
        """Who does the work: "C" with its instruction set, or "numpy"."""
        return self._network.name

    def __call__(self, images: Any) -> Any:
        """Logits (N, classes) float32, from images (N, C, H, W).

        Args:
            images: an array or a torch tensor. uint8 is pixels, which the file's transform
                normalises; floats are taken as they are.

        Returns:
            An array; a torch tensor where a tensor was given.

        Raises:
            TypeError: the numbers are neither uint8 nor floats.
            ValueError: the shape does not fit, or a number is not finite.
        """
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(images, torch.Tensor):
            array = images.detach().cpu()
            if array.is_floating_point():
                array = array.float()  # numpy has no bfloat16
            logits = self._logits(array.numpy())
            return torch.from_numpy(logits).to(images.device)
        return self._logits(np.asarray(images))

    def predict(self, images: Any) -> Prediction:
        """The likeliest class and all probabilities of each image, as arrays.

        Raises:
            TypeError, ValueError: as a call does.
        """
        logits = np.asarray(self(images))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        indices = probabilities.argmax(1)
        names = [str(i) if self.classes is None else self.classes[i] for i in indices]
        return Prediction(names, indices, probabilities)

    def memory(self) -> dict[str, int]:
        """Bytes that the network holds: weights as they are run, and scratch kept for calls."""
        return {
            "weights": self._network.weight_bytes,
            "scratch": self._network.scratch_bytes,
        }

    def _logits(self, images: Array) -> Array:
        images, table = self._checked(images)
        threads = self.threads or default_threads()
        if not len(images):
            return np.empty((0, len(self.packed.head_weight)), np.float32)
        try:
            return self._network.logits(images, table, threads)
        except NotFiniteError:
            bad = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
            where = f"image {bad[0]}" if bad else "an image"
            raise ValueError(f"{where} holds numbers that are not finite") from None

    def _checked(self, images: Array) -> tuple[Array, Array | None]:
        channels, multiple = self.packed.in_channels, self.packed.size_multiple
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must have shape (N, {channels}, H, W), not {images.shape}")
        if any(size == 0 or size % multiple for size in images.shape[2:]):
            height, width = images.shape[2:]
            raise ValueError(
                f"height and width must be multiples of {multiple}, not {height} x {width}"
            )
        if images.dtype == np.uint8:
            if self._table is None:
                raise TypeError(
                    "the file has no mean and std to normalise pixels of uint8 with:"
                    " give floats, or export it with a transform"
                )
            return np.ascontiguousarray(images), self._table
        if images.dtype.type not in _FLOATS:  # of any byte order
            raise TypeError(f"images must be uint8 or floats, not {images.dtype}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(images, np.float32), None


def load(path: str | PathLike[str], threads: int | None = None) -> Engine:
    """A packed network from its file, ready to run.

    Args:
        path: a file that ``python -m tritonbnn.export`` or :func:`tritonbnn.deploy.export` wrote.
        threads: of a call; None for as many as torch uses, or as there are processors.

    Raises:
        tritonbnn.cli.UserError: the file is missing, damaged, or of a newer version.
        tritonbnn.cli.SettingError: ``TRITONBNN_ISA`` names what there is not.
    """
    return Engine(file.read(Path(path)), threads)
