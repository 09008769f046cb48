"""A trained network as one small file, and an engine that runs it. Running one needs no torch.

engine = tritonbnn.deploy.load("net.tbnn")
engine.predict(images).classes
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbnn.cli import UserError
from tritonbnn.deploy import file
from tritonbnn.deploy.engine import BaseEngine, Engine, Prediction, load
from tritonbnn.deploy.packed import Packed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FORMATS", "BaseEngine", "Engine", "Prediction", "export", "load"]

FORMATS = {"packed": file.SUFFIX, "onnx": ".onnx", "c": ".c", "html": ".html"}
"""What a trained network can be written as, and how such a file's name ends."""


def export(
    model: "nn.Module",
    path: str | PathLike[str],
    classes: Sequence[str] | None = None,
    transform: dict[str, Any] | None = None,
    *,
    half_ends: bool = False,
    format: str = "packed",
) -> int:
    """Write a trained module in eval mode as a packed file, or as another of :data:`FORMATS`.

    Args:
        model: of :func:`tritonbnn.models.build_model`, with 1-bit weights.
        path: the file.
        classes: names of the classes, in order.
        transform: how an image becomes the input. ``mean`` and ``std``, a list of a number per
            channel each, normalise pixels between 0 and 1. Other entries are kept.
        half_ends: whether stem and head are kept in float16: a smaller file, and logits that
            differ a little.
        format: "packed"; "onnx", a graph of floats that ONNX Runtime and others run, see
            :func:`tritonbnn.deploy.onnx.model`, which needs the package onnx; "c", a C file with a
            header and a test beside it; or "html", a page for a browser, which needs ``image_size``
            in the transform, and clang and lld.

    Returns:
        The file's bytes, and those of what goes with it.

    Raises:
        ValueError: a module cannot be packed; the message names it. There is no such format.
        tritonbnn.cli.UserError: the file cannot be written.
    """
    from tritonbnn.deploy.fold import fold  # it needs torch, and nothing else here does

    write = writer(format)
    packed = fold(model, classes=classes, transform=transform, half_ends=half_ends)
    return write(packed, Path(path))


def files(format: str, path: Path) -> list[Path]:
    """What :func:`writer`'s function writes for a path: that file, and what goes with it."""
    if format != "c":
        return [path]
    from tritonbnn.deploy import program

    return program.paths(path)


def writer(format: str) -> Callable[[Packed, Path], int]:
    """The function that writes files of a format of :data:`FORMATS`, and returns their bytes.

    Raises:
        ValueError: there is no such format.
        tritonbnn.cli.UserError: the package onnx is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: choose from {', '.join(FORMATS)}")
    if format == "packed":
        return file.write
    if format == "c":
        from tritonbnn.deploy import program  # templates, which running a network does not need

        return program.write
    if format == "html":
        from tritonbnn.deploy import page  # it needs torch, as a transform does

        return page.write
    try:
        from tritonbnn.deploy import onnx  # a package that running a network does not need
    except ImportError as error:
        raise UserError(
            f"format onnx needs the package onnx: pip install onnx ({error})"
        ) from error
    return onnx.write
