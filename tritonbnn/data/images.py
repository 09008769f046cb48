"""Reading image files of any kind that a data set may hold."""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from tritonbnn.cli import UserError

MOST_PIXELS = 100_000_000
"""Of an image that is read: about 300 MB as RGB."""

# What Pillow knows and cannot decode to pixels by itself: EPS would run Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
_USUAL = ("JPEG", "PNG")  # tried first: some of the others take any bytes for theirs at first


WHITE_16_BITS = 65535


@dataclass(frozen=True)
class Decoding:
    """What the pixels of image files mean where a file alone does not say it.

    Args:
        white_level: the level of 16-bit grey that is white. Cameras and scanners often use only 10
            or 12 of the 16 bits.
        background: the colour behind what is transparent, as ``white`` or ``#ff8000``.
    """

    white_level: int = WHITE_16_BITS
    background: str = "white"

    def __post_init__(self) -> None:
        if not 1 <= self.white_level <= WHITE_16_BITS:
            raise UserError(f"--white-level must be 1 to {WHITE_16_BITS}, not {self.white_level}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"--background {self.background!r} is no colour: use a name like white, or #ff8000"
            ) from error


PLAIN = Decoding()
"""What most files mean."""


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


def load_image(path: Path | str, channels: int, decoding: Decoding = PLAIN) -> Image.Image:
    """Read an image file as 8-bit RGB (3 channels) or grey (1 channel); of an animation, its start.

    What is transparent is laid over the background, 16-bit grey levels are scaled to 8 bits, and
    EXIF orientation is ignored.

    Raises:
        BadImageError: The file is missing, empty, truncated, no image, has more than
            ``MOST_PIXELS``, or pixels without an 8-bit meaning (floating point, or integers beyond
            the white level).
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            _check_size(image)
            opaque = _without_transparency(image, decoding.background)
            return _to_8_bits(opaque, decoding.white_level).convert("RGB" if channels == 3 else "L")
    # Pillow's decoders raise almost anything on damaged bytes: SyntaxError, struct.error, EOFError
    except Exception as error:
        raise BadImageError(path, _reason(Path(path), error)) from error


def brightest(path: Path) -> int | None:
    """The highest level of a file of 16-bit grey; None where it is none, or cannot be read."""
    try:
        with Image.open(path, formats=_formats()) as image:
            _check_size(image)
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # whoever reads the image for its pixels says why it cannot be read
        return None


def pixels_of(path: Path) -> int:
    """How many pixels a file says that it has; 0 where it cannot be read."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return image.width * image.height
    except Exception:  # whoever reads the image for its pixels says why it cannot be read
        return 0


def is_image(path: str) -> bool:
    """Whether a file is one of a data set: by its suffix, or by its content where it has none."""
    suffix = Path(path).suffix.lower()
    return suffix in _suffixes() if suffix else _begins_like_an_image(path)


def _begins_like_an_image(path: str) -> bool:
    try:
        with Image.open(path, formats=_formats()):
            return True
    except OSError:  # of no format, or not to be read
        return False
    except Exception:  # it is one, and damaged: load_image will say so, with its name
        return True


@cache
def _formats() -> tuple[str, ...]:
    """What Pillow may open a file as."""
    Image.init()
    # Pillow warns of damaged EXIF and the like, which no pixel depends on, in every image, worker
    # and epoch. A filter for the whole process, because images are read in threads too.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    known = (*_USUAL, *(name for name in Image.OPEN if name not in _USUAL))
    return tuple(name for name in known if name in Image.OPEN and name not in _NOT_DECODED)


@cache
def _suffixes() -> frozenset[str]:
    """Those of all formats that are decoded."""
    Image.init()
    return frozenset(s for s, f in Image.registered_extensions().items() if f not in _NOT_DECODED)


def _check_size(image: Image.Image) -> None:
    """Before a pixel is decoded: a file of some kilobytes may stand for gigabytes."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")


def _without_transparency(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return image
    below = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image, white_level: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        return Image.fromarray(_scale(np.asarray(image), white_level))
    return image


def _scale(levels: np.ndarray, white_level: int) -> np.ndarray:
    if levels.min() < 0 or levels.max() > WHITE_16_BITS:
        raise ValueError("pixels beyond 16 bits")
    if levels.max() > white_level:
        raise ValueError(
            f"a level of {levels.max()} where {white_level} is white: set a higher --white-level"
        )
    scaled = levels.astype(np.uint32)  # in place from here: an image may have MOST_PIXELS
    scaled *= 255
    scaled += white_level // 2
    scaled //= white_level
    return scaled.astype(np.uint8)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows" if path.stat().st_size else "it is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
