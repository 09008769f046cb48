"""Fashion-MNIST from its four IDX files, packed (.gz) or unpacked."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from tritonbnn.cli import UserError

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SIDE = 28
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")

_PARTS = {"train": "train", "val": "t10k"}
_FILES = tuple(
    f"{p}-{f}" for p in _PARTS.values() for f in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
_REMEDY = (
    "run `apt install dataset-fashion-mnist`, or pass --data-dir with the four .gz files of"
    " https://github.com/zalandoresearch/fashion-mnist"
)

Arrays = tuple[np.ndarray, np.ndarray]


def find(data_dir: Path | None) -> Path | None:
    """The folder that holds the files, None where there is none.

    That is ``data_dir``, or where torchvision puts them below it; without a ``data_dir``, where
    Debian's package dataset-fashion-mnist installs them.
    """
    if data_dir is None:
        places = [DEBIAN_DIR]
    else:
        places = [data_dir, data_dir / "FashionMNIST" / "raw"]
    return next((p for p in places if any(_locate(p, name) for name in _FILES)), None)


def load(data_dir: Path | None) -> tuple[Arrays, Arrays]:
    """The training and the test part, each (N, 28, 28) uint8 images and (N,) labels."""
    folder = find(data_dir)
    if folder is None:
        where = DEBIAN_DIR if data_dir is None else data_dir
        raise UserError(f"no Fashion-MNIST files in {where}: {_REMEDY}")
    return _load_part(folder, "train"), _load_part(folder, "val")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Raises:
        UserError: The file is no complete IDX file; the message names it.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, getattr(error, "strerror", None) or str(error)) from error
    zeros, kind, rank = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (0, 0, 0)
    if (zeros, kind) != (0, 0x08) or not 1 <= rank <= 3:
        raise _corrupt(path, "it does not begin like an IDX file of bytes")
    start = 4 + 4 * rank
    if len(content) < start:
        raise _corrupt(path, "its header is cut short")
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise _corrupt(path, f"{len(content) - start} bytes of data instead of {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _load_part(folder: Path, part: str) -> Arrays:
    prefix = _PARTS[part]
    image_path = _require(folder, f"{prefix}-images-idx3-ubyte")
    label_path = _require(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise _corrupt(image_path, f"an array of shape {images.shape}, not of 28 x 28 images")
    if labels.shape != images.shape[:1]:
        raise _corrupt(label_path, f"labels of shape {labels.shape} for {len(images)} images")
    if labels.max() >= len(CLASSES):
        raise _corrupt(label_path, f"a label {labels.max()}; there are classes 0 to 9")
    return images, labels.astype(np.int64)


def _locate(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _locate(folder, name)
    if path is None:
        raise UserError(f"{folder / name}.gz is missing: {_REMEDY}")
    return path


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is corrupt ({reason}): replace it; {_REMEDY}")
