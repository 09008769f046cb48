"""Reading image files of any kind that a data set may hold."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tritonbnn.cli import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class BadImageError(UserError):
    """A file that should be an image and cannot be read as one.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be read as an image ({self.reason}): replace or remove it"
            " (to train without such files, pass --skip-bad-images)"
        )


def load_image(path: Path | str, channels: int) -> Image.Image:
    """Read an image file as 8-bit RGB (3 channels) or grey (1 channel).

    Transparency is dropped, 16-bit grey levels are scaled to 8 bits, and EXIF orientation is
    ignored: all as torchvision's loader does, except that it saturates 16-bit grey levels.

    Raises:
        BadImageError: The file is missing, empty, truncated, no image, or has pixels without an
            8-bit meaning (floating point, or integers beyond 16 bits).
    """
    try:
        with Image.open(path) as image:
            return _to_8_bits(image).convert("RGB" if channels == 3 else "L")
    # Pillow's decoders raise almost anything on damaged bytes: SyntaxError, struct.error, EOFError
    except Exception as error:
        raise BadImageError(path, _reason(Path(path), error)) from error


def is_image(name: str) -> bool:
    """Whether a file of this name belongs to a data set: by its suffix, hidden files left out."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        return Image.fromarray(_scale_16_bits(np.asarray(image).astype(np.int64)))
    # straight to RGB, Pillow warns about a palette with transparency; the pixels are the same
    return image.convert("RGBA") if image.mode == "P" else image


def _scale_16_bits(levels: np.ndarray) -> np.ndarray:
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("pixels beyond 16 bits")
    return ((levels * 255 + 32767) // 65535).astype(np.uint8)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows" if path.stat().st_size else "it is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
