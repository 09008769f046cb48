"""Weights from elsewhere as checkpoints: their files know neither data nor step."""

from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tritonbnn.cli import UserError
from tritonbnn.files import utf_8_name
from tritonbnn.models import build_model, load_adambnn, network_of_weights
from tritonbnn.models.foreign import is_torch_file, read_tensors
from tritonbnn.models.published import adambnn_network, is_adambnn
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import FACTS, Checkpoint


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


def add_told(parser: ArgumentParser) -> None:
    """The flags of a command for what :class:`Told` holds."""
    parser.add_argument(
        "--step",
        type=int,
        choices=(1, 2),
        help="of weights from elsewhere: 1 takes them as they are, 2 binarises them",
    )
    parser.add_argument(
        "--recipe",
        help="of weights from elsewhere: whose data and size of images they are for (default:"
        " imagenet)",
    )


def is_foreign(path: Path) -> bool:
    """Whether a file holds tensors and is no checkpoint of this package."""
    try:
        if is_torch_file(path):
            return True
        with utf_8_name(path) as name, safe_open(name, framework="pt") as file:
            return FACTS not in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False  # who reads it says why it cannot be read


def read_foreign(path: Path, told: Told) -> Checkpoint:
    """Weights as a checkpoint of ours: AdamBNN's published ones, or those of a network of ours.

    Args:
        path: the file. No code in it is run.
        told: what the file does not say.

    Raises:
        UserError: the file is damaged or of another network, or there is no step.
    """
    config = parse([told.recipe or "imagenet"]).config
    try:
        state = read_tensors(path)
        network, tensors = _ours(state, config.small_images)
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


def _ours(state: dict[str, Tensor], small_images: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The network that weights are of, and the weights by our names."""
    if not is_adambnn(state):
        return network_of_weights(state, small_images=small_images), state
    network = {**adambnn_network(state), "small_images": small_images}
    model = build_model(**network)
    load_adambnn(model, state)
    return network, dict(model.state_dict())
