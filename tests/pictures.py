"""Images to read, and what several tests ask of the data sources."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tritonbnn.data.sources import open_source


def source(name, data_dir=None, **options):
    defaults = {"image_size": 32, "augment": "none", "lighting": "none", "seed": 0, "step": 1}
    return open_source(name, data_dir=data_dir, **{**defaults, **options})


def grey(x: torch.Tensor) -> np.ndarray:
    """The 8-bit grey levels behind a normalised one-channel image."""
    return ((x[0] * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def random_image(seed: int, side: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion_arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)


def write_fashion(folder: Path, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", 5), ("t10k", 3))):
        images, labels = fashion_arrays(count, seed)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)


def spoil_image(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"just words\n" * 9, "truncated": content[: len(content) // 2]}[how]
    )
