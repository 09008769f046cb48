"""Load the published AdamBNN and ReActNet-A weights, strictly and without running any code."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonbnn.models.blocks import BinaryNetwork
from tritonbnn.models.foreign import bare_names, read_tensors
from tritonbnn.models.reactnet import STEM_CHANNELS
from tritonbnn.models.registry import build_model, network_of_weights

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
        source: a published ``.pth.tar``, another file that :func:`read_tensors` reads, or a state
            dict; with the published names, and prefixes such as ``module.`` or none.

    Returns:
        What was done.

    Raises:
        TypeError: ``model`` is not ReActNet-A.
        ValueError: the file is not a checkpoint that loads without running code, a tensor is
            missing, left over, or has another shape, or ``model`` is on the meta device.
    """
    if not (isinstance(model, BinaryNetwork) and "blocks.0.0.weight" in model.state_dict()):
        raise TypeError('model must come from build_model("reactnet_a", ...)')
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(
            "model is on the meta device, where nothing can be loaded: give it memory first, with"
            ' model.to_empty(device="cpu")'
        )
    name = "state dict" if isinstance(source, dict) else str(source)
    published = bare_names(name, source) if isinstance(source, dict) else _read(Path(source))
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def is_adambnn(state: dict[str, Tensor]) -> bool:
    """Whether the tensors have the names of AdamBNN's authors."""
    return any(name.startswith("feature.") for name in state)


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


def network_in(
    state: dict[str, Tensor], *, small_images: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The network that weights from elsewhere are of, and the weights by our names.

    Args:
        state: AdamBNN's published tensors, or those of a network of ours.
        small_images: what no shape tells.

    Returns:
        The arguments of ``build_model``, and a state dict for what it builds.

    Raises:
        ValueError: they are of another network.
    """
    if not is_adambnn(state):
        return network_of_weights(state, small_images=small_images), state
    network = {**adambnn_network(state), "small_images": small_images}
    model = build_model(**network)
    load_adambnn(model, state)
    return network, dict(model.state_dict())


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
