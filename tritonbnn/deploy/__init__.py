"""A trained network as one small file, and an engine that runs it. Running one needs no torch.

engine = tritonbnn.deploy.load("net.tbnn")
engine.predict(images).classes
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbnn.deploy import file
from tritonbnn.deploy.engine import Engine, Prediction, load

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Engine", "Prediction", "export", "load"]


def export(
    model: "nn.Module",
    path: str | PathLike[str],
    classes: Sequence[str] | None = None,
    transform: dict[str, Any] | None = None,
    *,
    half_ends: bool = False,
) -> int:
    """Write a trained module in eval mode as a packed file.

    Args:
        model: of :func:`tritonbnn.models.build_model`, with 1-bit weights.
        path: the file.
        classes: names of the classes, in order.
        transform: how an image becomes the input. ``mean`` and ``std``, a list of a number per
            channel each, normalise pixels between 0 and 1. Other entries are kept.
        half_ends: whether stem and head are kept in float16: a smaller file, and logits that
            differ a little.

    Returns:
        The file's bytes.

    Raises:
        ValueError: a module cannot be packed; the message names it.
        tritonbnn.cli.UserError: the file cannot be written.
    """
    from tritonbnn.deploy.fold import fold  # it needs torch, and nothing else here does

    packed = fold(model, classes=classes, transform=transform, half_ends=half_ends)
    return file.write(packed, Path(path))
