"""From a checkpoint to a network: to use it, to go on with it, or to start another run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tritonbnn.cli import UserError
from tritonbnn.data.classes import odd_class, other_order, warn_of_numbers
from tritonbnn.data.sources import Source, open_again
from tritonbnn.methods import METHODS, Method
from tritonbnn.models import network_in
from tritonbnn.models.foreign import read_tensors
from tritonbnn.settings import filled
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import BEST, Checkpoint, is_foreign, read
from tritonbnn.train.recipe import stage_names

logger = logging.getLogger(__name__)

_HEAD = "fc."
_SHOWN = 300  # characters of a reason


@dataclass(frozen=True)
class Told:
    """What a user tells of weights whose file does not.

    Attributes:
        step: 1 or 2, or None. Both steps save real weights by the same names, and step 2 binarises
            them as it computes.
        recipe: whose data and views they are for, and whether their network is for small images;
            None for the imagenet recipe's.
    """

    step: int | None = None
    recipe: str | None = None


NOTHING = Told()


def find_checkpoint(place: Path, kind: str = BEST) -> Path:
    """The file meant by a file, a run's folder (of its furthest stage), or a stage's folder.

    Args:
        place: file or folder.
        kind: the name of the file in a stage's folder.

    Raises:
        UserError: there is none.
    """
    if not place.exists():
        raise UserError(f"{place} does not exist: name a checkpoint file or a run's folder")
    if not place.is_dir():
        if not place.is_file():  # who opens a pipe may wait for ever
            raise UserError(f"{place} is a device or a pipe: name a checkpoint file")
        return place
    candidates = [place / folder / kind for folder in (*reversed(stage_names(place)), "")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"{place} holds no checkpoint yet: name a checkpoint file or another run")
    return found


def network_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of ``build_model`` that the checkpoint's network was built with."""
    try:
        return dict(checkpoint.facts["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} does not say what network it is of") from error


def build(
    network: dict[str, Any], method: type[Method] = Method, settings: Any = None
) -> nn.Module:
    """The network that a method trains, with a wrong argument as the user's mistake.

    Args:
        network: the arguments of ``build_model``.
        method: that builds it; most methods use ``build_model`` itself.
        settings: of the method.

    Raises:
        UserError: the arguments make no network.
    """
    try:
        return method.build(settings, network)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def load_network(place: Path, told: Told = NOTHING) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint, with its weights; see :func:`read_any`.

    Raises:
        UserError: the checkpoint is missing, damaged, or not what it says.
    """
    checkpoint = read_any(place, told)
    return network_with_weights(checkpoint), checkpoint


def network_with_weights(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint that has been read.

    A method of the user's own is not imported, as that would run code that a checkpoint names. Its
    network is taken to be ``build_model``'s.

    Raises:
        UserError: the checkpoint is not what it says.
    """
    table = dict(checkpoint.facts.get("method", {}))
    method = METHODS.get(table.pop("name", ""), Method)
    settings = filled(method.Settings, table, "method.") if method is not Method else None
    model = build(network_of(checkpoint), method, settings)
    load_strictly(model, checkpoint)
    return model


def read_any(place: Path, told: Told = NOTHING) -> Checkpoint:
    """A checkpoint of this package, or weights from elsewhere.

    Args:
        place: file or run.
        told: of weights from elsewhere; NOTHING for a checkpoint of this package.

    Raises:
        UserError: it is missing, damaged, or of neither kind, or something is told too much or not.
    """
    path = find_checkpoint(place)
    if is_foreign(path):
        return read_foreign(path, told)
    checkpoint = read(path)
    if told != NOTHING:
        raise UserError(
            f"--step and --recipe are for weights from elsewhere, and {path} knows its own:"
            " leave it out"
        )
    return checkpoint


def read_foreign(path: Path, told: Told) -> Checkpoint:
    """Weights from elsewhere as a checkpoint of ours: their files know neither data nor step.

    Args:
        path: the file, with AdamBNN's published weights or those of a network of ours. No code in
            it is run.
        told: what the file does not say.

    Raises:
        UserError: the file is damaged or of another network, or there is no step.
    """
    config = parse([told.recipe or "imagenet"]).config
    try:
        network, tensors = network_in(read_tensors(path), small_images=config.small_images)
    except ValueError as error:
        told_of = str(error) if str(path) in str(error) else f"{path}: {error}"
        remedy = "" if "convert it" in told_of else "; use another checkpoint"
        raise UserError(f"{told_of}{remedy}") from error
    if told.step is None:
        raise UserError(
            f"{path} does not say which step its weights are of: give --step 1 to use them as they"
            " are, or --step 2 to binarise them"
        )
    network["binary_weights"] = told.step == 2
    data = {
        "name": config.dataset,
        "dir": config.data_dir,
        "classes": None,
        "channels": network["in_channels"],
        "image_size": config.image_size,
        "augment": config.augment,
    }
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint(path, tensors, {"network": network, "data": data})


def open_data(
    checkpoint: Checkpoint, data_dir: Path | None, class_order: str | None = None
) -> Source:
    """The data that a checkpoint was trained on.

    Args:
        checkpoint: of a run.
        data_dir: where they are now; None for where they were.
        class_order: of their folders, where the checkpoint does not name its classes.

    Raises:
        UserError: they are not there, or have other classes or channels.
    """
    data: dict[str, Any] = checkpoint.facts["data"]
    source = open_again(data, data_dir, class_order)
    network = network_of(checkpoint)
    if source.channels != network["in_channels"]:
        raise UserError(
            f"the data have images of {source.channels} channels where {checkpoint.path} takes"
            f" {network['in_channels']}: choose another --data-dir"
        )
    count = network["num_classes"]
    names = data["classes"]
    if len(source.classes) != count:
        raise UserError(
            f"the data have other classes than {checkpoint.path}"
            f" ({len(source.classes)} and {count}): choose another --data-dir"
        )
    if names is None:
        warn_of_numbers(source.classes)
    elif odd := odd_class(source.classes, names, "the data", "the checkpoint"):
        raise UserError(
            f"the data have other classes than {checkpoint.path}: they differ in {odd}:"
            " choose another --data-dir"
        )
    return source


def load_strictly(model: nn.Module, checkpoint: Checkpoint) -> None:
    """All weights of the checkpoint, by name and shape.

    Raises:
        UserError: a tensor is missing, left over, has another shape, or is not finite.
    """
    try:
        model.load_state_dict(checkpoint.group("model"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint.path} does not fit the network: {_short(error)}") from error
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{checkpoint.path} holds numbers in {name} that are not finite:"
                " use another checkpoint"
            )


def _short(error: RuntimeError) -> str:
    """The last line that torch says of a misfit, without all the names that it may list."""
    reason = str(error).strip().splitlines()[-1].strip()
    return reason if len(reason) <= _SHOWN else f"{reason[:_SHOWN]}..."


def check_same_network(checkpoint: Checkpoint, network: dict[str, Any]) -> None:
    """Refuse a checkpoint of another network; ``binary_weights`` may differ between the steps.

    Raises:
        UserError: naming what differs.
    """
    given = network_of(checkpoint)
    different = [
        f"{key} {given.get(key)!r} and not {value!r}"
        for key, value in network.items()
        if key != "binary_weights" and given.get(key) != value
    ]
    if different:
        raise UserError(
            f"{checkpoint.path} has {', '.join(different)}: use a checkpoint of the same network"
        )


def initialise_from(
    model: nn.Module, network: dict[str, Any], place: Path, classes: Sequence[str]
) -> None:
    """Start from weights at hand; where they are of other classes, the head stays as it is.

    Args:
        model: freshly built.
        network: what it was built from.
        place: a run, a checkpoint file, or weights from elsewhere.
        classes: of the data.

    Raises:
        UserError: the checkpoint is of another architecture or width, or has the same classes in
            another order.
    """
    path = find_checkpoint(place)
    if is_foreign(path):
        # whatever they were trained for, its weights are real, and its images are those of this run
        checkpoint = read_foreign(path, Told(step=1 + network["binary_weights"]))
        checkpoint.facts["network"]["small_images"] = network["small_images"]
    else:
        checkpoint = read(path)
    before, after = network_of(checkpoint)["num_classes"], network["num_classes"]
    check_same_network(checkpoint, {**network, "num_classes": before})
    odd = _other_classes(checkpoint, classes) if before == after else None
    if before == after and odd is None:
        load_strictly(model, checkpoint)
    else:
        own = model.state_dict()
        for name in [n for n in own if n.startswith(_HEAD)]:
            checkpoint.tensors[f"model.{name}"] = own[name].clone()
        load_strictly(model, checkpoint)
        what = f"other classes, {odd}" if odd else f"{after} classes after {before}"
        logger.info("%s: the head starts anew", what)
    logger.info("starting from the weights in %s", checkpoint.path)


def _other_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> str | None:
    """How the classes of a checkpoint that names them differ from others; None where they do not.

    Raises:
        UserError: they are the same in another order.
    """
    names = checkpoint.facts["data"]["classes"]
    if names is None:
        return None
    if odd := odd_class(classes, names, "the data", "the checkpoint"):
        return odd
    if order := other_order(classes, names):
        raise UserError(
            f"{checkpoint.path} has the classes in another order ({order}): use the --class-order"
            " that its run had"
        )
    return None
