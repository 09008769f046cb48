"""The digits that are part of the package: 1,797 handwritten ones of 8 x 8 pixels."""

from dataclasses import dataclass
from importlib import resources
from typing import ClassVar

import numpy as np

from tritonbnn.data.splits import GREY, ArrayImages, Normalisation, Splits


@dataclass(frozen=True)
class Digits:
    """Opens them; there is nothing to set."""

    title: ClassVar[str] = "the embedded digits"
    channels: ClassVar[int] = 1
    normalisation: ClassVar[Normalisation] = GREY
    side: ClassVar[int] = 8
    border: ClassVar[int] = 0

    def open(self) -> Splits:
        """Read all of them."""
        with resources.files("tritonbnn.data").joinpath("digits.npz").open("rb") as file:
            arrays = dict(np.load(file))
        test = arrays["test"]
        pixels = np.rint(arrays["images"] * (255 / 16)).astype(np.uint8)[:, None]
        labels = arrays["labels"].astype(np.int64)
        return Splits(
            tuple(str(digit) for digit in range(10)),
            ArrayImages(pixels[~test], labels[~test]),
            ArrayImages(pixels[test], labels[test]),
        )
