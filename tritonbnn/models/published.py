"""Load the published AdamBNN and ReActNet-A weights, strictly and without running any code."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.models.blocks import BinaryNetwork
from tritonbnn.models.reactnet import STEM_CHANNELS

logger = logging.getLogger(__name__)

# Our entry of a unit, and the published one in each half of a block.
_HALVES = (
    {
        "shift_in": "move11.bias",
        "weight": "binary_3x3.weight",
        "bn": "bn1",
        "shift_mid": "move12.bias",
        "slope": "prelu1.weight",
        "shift_out": "move13.bias",
    },
    {
        "shift_in": "move21.bias",
        "weight": "binary_pw.weight",
        "bn": "bn2",
        "shift_mid": "move22.bias",
        "slope": "prelu2.weight",
        "shift_out": "move23.bias",
    },
)
# Where a block widens, a pair takes the place; it is joined along the output channels, in order.
_PAIRS = {
    "weight": ("binary_pw_down1.weight", "binary_pw_down2.weight"),
    "bn": ("bn2_1", "bn2_2"),
}
_STEM = {"0.weight": "conv1.weight", "1": "bn1"}
_PREFIX = "module."  # that of DataParallel
_FIRST, _HEAD = "feature.0.conv1.weight", "fc.weight"
_NAMED = 3
"""Tensors that an error names; another network's file may have hundreds that do not fit."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_adambnn` did.

    Attributes:
        source: where the weights came from.
        tensors: how many published tensors were used: all of them.
        merged: how many entries of ours were joined from a widening pair.
    """

    source: str
    tensors: int
    merged: int


def load_adambnn(model: nn.Module, source: str | Path | dict[str, Tensor]) -> LoadReport:
    """Load published ReActNet-A weights into ``model``; every tensor is used or named in the error.

    Step-1 and step-2 files look alike: which of the two a file is, the caller says by having built
    the model with ``binary_weights`` False or True.

    Args:
        model: ``build_model("reactnet_a", ...)`` of the file's width and classes.
        source: a published ``.pth.tar``, or a state dict with the published names; with or without
            the prefix ``module.``.

    Returns:
        What was done.

    Raises:
        TypeError: ``model`` is not ReActNet-A.
        ValueError: the file is not a checkpoint that loads without running code, or a tensor is
            missing, left over, or has another shape.
    """
    if not (isinstance(model, BinaryNetwork) and "blocks.0.0.weight" in model.state_dict()):
        raise TypeError('model must come from build_model("reactnet_a", ...)')
    name = "state dict" if isinstance(source, dict) else str(source)
    state_dict = source if isinstance(source, dict) else read_adambnn(Path(source))
    published = _without_prefix(name, state_dict)
    sources = _published_names(model, published)
    _check_names(name, sources, published)
    own = model.state_dict()
    merged = 0
    state = {}
    for key, names in sources.items():
        merged += len(names) > 1
        state[key] = _join(name, {n: published[n] for n in names}, own[key])
    model.load_state_dict(state)
    report = LoadReport(name, len(published), merged)
    logger.info(
        "loaded %d tensors from %s; %d of the model's entries were joined from pairs",
        report.tensors,
        report.source,
        report.merged,
    )
    return report


def read_adambnn(path: Path) -> dict[str, Tensor]:
    """The state dict of a published file, its names without the prefix ``module.``.

    Raises:
        ValueError: it is not a checkpoint that loads without running code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    # the unpickler raises almost anything on damaged bytes
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint that can be loaded without running code"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in state.items()
    ):
        raise ValueError(f"{path} holds no state dict of plain tensors")
    return _without_prefix(str(path), state)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers that are all in the file.

    A stride of 0 makes petabytes of one number, and shapes say how large a network to build.
    """
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _without_prefix(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    if len(published) < len(state):
        raise ValueError(f"{name} holds a tensor twice, with and without the prefix {_PREFIX!r}")
    return published


def adambnn_network(published: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``build_model`` for a published state dict, classes and width by its shapes.

    Which step it is of, no shape tells.

    Raises:
        ValueError: it is of another network.
    """
    for name, dims in ((_FIRST, 4), (_HEAD, 2)):
        if name not in published or published[name].dim() != dims:
            raise ValueError(f"not a published ReActNet-A: it has no {name} of {dims} dimensions")
    return {
        "name": "reactnet_a",
        "num_classes": published[_HEAD].shape[0],
        "width": published[_FIRST].shape[0] / STEM_CHANNELS,
        "in_channels": published[_FIRST].shape[1],
        "small_images": False,
    }


def _published_names(model: nn.Module, published: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The published tensors that make up each entry of ``model``'s state dict."""
    sources: dict[str, tuple[str, ...]] = {}
    for key in model.state_dict():
        root, rest = key.split(".", 1)
        if root == "fc":
            sources[key] = (key,)
        elif root == "stem":
            ours, leaf = _split_leaf(rest, _STEM)
            sources[key] = (f"feature.0.{_STEM[ours]}{leaf}",)
        else:
            block, half, entry = rest.split(".", 2)
            prefix = f"feature.{int(block) + 1}."
            ours, leaf = _split_leaf(entry, _HALVES[int(half)])
            names: tuple[str, ...] = (_HALVES[int(half)][ours],)
            if half == "1" and f"{prefix}{_PAIRS['weight'][0]}" in published:
                names = _PAIRS.get(ours, names)
            sources[key] = tuple(f"{prefix}{n}{leaf}" for n in names)
    return sources


def _split_leaf(entry: str, table: dict[str, str]) -> tuple[str, str]:
    """Split an entry into the part that ``table`` names and the rest: ("bn", ".weight")."""
    if entry in table:
        return entry, ""
    head, _, leaf = entry.partition(".")
    return head, f".{leaf}"


def _check_names(
    name: str, sources: dict[str, tuple[str, ...]], published: dict[str, Tensor]
) -> None:
    wanted = {n for names in sources.values() for n in names}
    missing, unused = sorted(wanted - published.keys()), sorted(published.keys() - wanted)
    problems = [
        f"{what} {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for what, names in (("missing", missing), ("not used", unused))
        if names
    ]
    if problems:
        raise ValueError(f"{name} does not fit the model: {'; '.join(problems)}")


def _join(name: str, parts: dict[str, Tensor], own: Tensor) -> Tensor:
    """One entry of ours from its published parts, in order; shifts lose their singleton axes."""
    shape = (own.shape[0] // len(parts), *own.shape[1:]) if own.dim() else ()
    for key, part in parts.items():
        if tuple(part.shape) not in (shape, (1, *shape, 1, 1)):
            raise ValueError(
                f"{name} does not fit the model: {key} must have shape {shape},"
                f" not {tuple(part.shape)}"
            )
    if own.dim() == 0:  # num_batches_tracked, which both halves of a pair count alike
        return next(iter(parts.values())).reshape(())
    return torch.cat([part.reshape(shape) for part in parts.values()])
