"""Published AdamBNN files as checkpoints: their format knows neither data nor step."""

from pathlib import Path

from tritonbnn.cli import UserError
from tritonbnn.models import build_model
from tritonbnn.models.published import adambnn_network, load_adambnn, read_adambnn
from tritonbnn.train.checkpoint import Checkpoint

_BEGINNINGS = (b"PK", b"\x80")  # of what torch.save writes: a zip, and before torch 1.6 a pickle


def is_published(path: Path) -> bool:
    """Whether torch.save wrote the file, as AdamBNN's authors did, and not this package."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False  # who reads it says why it cannot be read
    # safetensors begins with a length of 8 bytes, which may be like any, and then JSON
    return start.startswith(_BEGINNINGS) and start[8:] != b"{"


def read_published(path: Path, step: int | None) -> Checkpoint:
    """A file in the format of AdamBNN's authors as a checkpoint of ours, with their views of data.

    Args:
        path: the file. No code in it is run.
        step: which its weights are of. Both steps save real weights by the same names, and step 2
            binarises them on the fly, so the file does not tell.

    Raises:
        UserError: the file is damaged or of another network, or there is no step.
    """
    try:
        state = read_adambnn(path)
        network = {**adambnn_network(state), "binary_weights": step == 2}
        model = build_model(**network)
        load_adambnn(model, state)
    except ValueError as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise UserError(f"{told}; use another checkpoint") from error
    if step is None:
        raise UserError(
            f"{path} does not say which step its weights are of: give --step 1 to use them as they"
            " are, or --step 2 to binarise them"
        )
    data = {
        "name": "images",
        "dir": "",
        "classes": None,
        "channels": network["in_channels"],
        "image_size": 224,
        "augment": "imagenet",
    }
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return Checkpoint(path, tensors, {"network": network, "data": data})
