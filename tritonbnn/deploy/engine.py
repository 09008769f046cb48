"""Run a packed network: on a CPU with numpy and safetensors alone, or elsewhere."""

import logging
import sys
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tritonbnn.cli import UserError
from tritonbnn.deploy import file
from tritonbnn.deploy.native import NativeNetwork, NotFiniteError, default_threads
from tritonbnn.deploy.order import byte_table
from tritonbnn.deploy.packed import Array, Packed
from tritonbnn.deploy.plain import PlainNetwork

logger = logging.getLogger(__name__)

_FLOATS = (np.float16, np.float32, np.float64)
_MOST_THREADS = 1024


class Prediction(NamedTuple):
    """What :meth:`BaseEngine.predict` says of N images.

    Attributes:
        classes: the name of each image's likeliest class; its number as text where the file has no
            names.
        indices: (N,) int64, the same as numbers.
        probabilities: (N, classes) float32.
    """

    classes: list[str]
    indices: Array
    probabilities: Array


class BaseEngine:
    """A packed network that is ready to run, on whatever device.

    Args:
        packed: the network.

    Attributes:
        packed: the network.
        classes: names of the classes, or None.
        transform: how an image becomes the input, or None.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.classes = packed.classes
        self.transform = packed.transform

    @property
    def name(self) -> str:
        """Who does the work."""
        raise NotImplementedError

    def __call__(self, images: Any) -> Any:
        """Logits (N, classes) float32, from images (N, C, H, W).

        Args:
            images: an array or a torch tensor. uint8 is pixels, which the file's transform
                normalises; floats are taken as they are.

        Returns:
            An array; a torch tensor on the images' device where a tensor was given.

        Raises:
            TypeError: the numbers are neither uint8 nor floats.
            ValueError: the shape does not fit, or a number is not finite.
        """
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """Bytes that the network holds: weights as they are run, and scratch kept for calls."""
        raise NotImplementedError

    def predict(self, images: Any) -> Prediction:
        """The likeliest class and all probabilities of each image, as arrays.

        Raises:
            TypeError, ValueError: as a call does.
        """
        logits = self(images)
        logits = logits if isinstance(logits, Array) else logits.cpu().numpy()
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        indices = probabilities.argmax(1)
        names = [str(i) if self.classes is None else self.classes[i] for i in indices]
        return Prediction(names, indices, probabilities)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of this shape go into the network."""
        channels, multiple = self.packed.in_channels, self.packed.size_multiple
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"images must have shape (N, {channels}, H, W), not {tuple(shape)}")
        height, width = shape[2:]
        if any(size == 0 or size % multiple for size in (height, width)):
            raise ValueError(
                f"height and width must be multiples of {multiple}, not {height} x {width}"
            )

    def check_numbers(self, dtype: object, *, pixels: bool, floats: bool) -> None:
        """Raise TypeError unless images may be of these numbers.

        Args:
            dtype: as the message names it.
            pixels: whether it is uint8.
            floats: whether it is a float.
        """
        if pixels and (self.transform is None or self.transform.get("mean") is None):
            raise TypeError(
                "the file has no mean and std to normalise pixels of uint8 with:"
                " give floats, or export it with a transform"
            )
        if not pixels and not floats:
            raise TypeError(f"images must be uint8 or floats, not {dtype}")

    def as_numbers(self, images: Array) -> Array:
        """Images as they are computed with: contiguous, uint8 or float32.

        Raises:
            TypeError, ValueError: they do not fit.
        """
        self.check_shape(images.shape)
        pixels, floats = images.dtype == np.uint8, images.dtype.type in _FLOATS  # of any byte order
        self.check_numbers(images.dtype, pixels=pixels, floats=floats)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(images, None if pixels else np.float32)


class Engine(BaseEngine):
    """A packed network on a CPU. Several threads of a program may use it at once.

    Args:
        packed: the network.
        threads: of a call; None for as many as torch uses, or as there are processors.

    Attributes:
        threads: of a call.
    """

    def __init__(self, packed: Packed, threads: int | None = None) -> None:
        super().__init__(packed)
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise ValueError(f"threads must be between 1 and {_MOST_THREADS}, not {threads}")
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
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(images, torch.Tensor):
            array = images.detach().cpu()
            if array.is_floating_point():
                array = array.float()  # numpy has no bfloat16
            logits = self._logits(array.numpy())
            return torch.from_numpy(logits).to(images.device)
        return self._logits(np.asarray(images))

    def memory(self) -> dict[str, int]:
        return {
            "weights": self._network.weight_bytes,
            "scratch": self._network.scratch_bytes,
        }

    def _logits(self, images: Array) -> Array:
        images = self.as_numbers(images)
        threads = self.threads or default_threads()
        if not len(images):
            return np.empty((0, len(self.packed.head_weight)), np.float32)
        table = self._table if images.dtype == np.uint8 else None
        try:
            return self._network.logits(images, table, threads)
        except NotFiniteError:
            bad = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
            where = f"image {bad[0]}" if bad else "an image"
            raise ValueError(f"{where} holds numbers that are not finite") from None


def load(
    path: str | PathLike[str],
    threads: int | None = None,
    *,
    device: str = "cpu",
    precision: str = "fp32",
) -> BaseEngine:
    """A packed network from its file, ready to run.

    Args:
        path: a file that ``python -m tritonbnn.export`` or :func:`tritonbnn.deploy.export` wrote.
        threads: of a call on a CPU; None for as many as torch uses, or as there are processors.
        device: "cpu", which needs no torch; or "cuda" or "cuda:N".
        precision: of what flows between units on a GPU: "fp32", "bf16" or "fp16".

    Raises:
        tritonbnn.cli.UserError: the file is missing, damaged, or of a newer version; or the device
            is not there.
        tritonbnn.cli.SettingError: ``TRITONBNN_ISA`` names what there is not.
        ValueError: the device has no such setting.
    """
    if device == "cpu":
        if precision != "fp32":
            raise ValueError(f"a CPU runs packed networks in fp32, not in {precision}")
        return Engine(file.read(Path(path)), threads)
    if threads is not None:
        raise ValueError("threads are of a CPU: leave them out, or use device='cpu'")
    try:
        from tritonbnn.deploy import gpu  # it needs torch and Triton, and nothing else here does
    except ImportError as error:
        raise UserError(
            f"device {device!r} needs torch and Triton: install them, or use device='cpu' ({error})"
        ) from error
    place = gpu.place(device)
    return gpu.GpuEngine(file.read(Path(path)), place, precision)
