"""The real-valued network that a student learns from: torchvision's ResNet-34."""

from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet34_Weights, resnet34

from tritonbnn.cli import UserError
from tritonbnn.models.foreign import read_tensors

# Pinned: torchvision's default weights may change, and the published numbers are with these.
WEIGHTS_URL = ResNet34_Weights.IMAGENET1K_V1.url
_CHANNELS = 3
_HEAD = "fc.weight"


def load_teacher(
    spec: str, *, num_classes: int, device: torch.device | str, channels: int = _CHANNELS
) -> nn.Module | None:
    """Load a frozen teacher in evaluation mode.

    Args:
        spec: ``"none"``; ``"resnet34"`` for torchvision's ImageNet weights, downloaded once; or a
            file with the weights of a torchvision ResNet-34, as
            :func:`~tritonbnn.models.foreign.read_tensors` takes them.
        num_classes: classes of the data.
        device: where to put it.
        channels: channels of the data.

    Returns:
        The teacher, or None for ``"none"``.

    Raises:
        UserError: The weights cannot be had or read, or do not fit the data.
    """
    if spec == "none":
        return None
    if channels != _CHANNELS:
        raise UserError("the teacher sees colour images and the data are grey: use --teacher none")
    if spec == "resnet34":
        _check_classes(spec, len(ResNet34_Weights.IMAGENET1K_V1.meta["categories"]), num_classes)
        state = _download()
    else:
        state = _read(Path(spec))
    return _build(spec, state, num_classes).to(device)


def _download() -> dict[str, Tensor]:
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), path.stem.rpartition("-")[2])
        # a RuntimeError is the hub's word for a wrong checksum
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(
                f"cannot download the teacher's weights ({error}): fetch {WEIGHTS_URL} on another"
                " machine and pass it as --teacher FILE, or train on labels with --teacher none"
            ) from error
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"teacher {path} is neither a file, nor resnet34, nor none") from error
    except OSError as error:
        raise UserError(f"teacher {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"teacher {error}") from error


def _build(spec: str, state: dict[str, Tensor], num_classes: int) -> nn.Module:
    head = state.get(_HEAD)
    if head is None or head.ndim != 2:
        raise UserError(f"teacher {spec} is not a ResNet-34 state dict: it has no matrix {_HEAD}")
    _check_classes(spec, len(head), num_classes)
    with torch.device("meta"):  # no initial weights, which would draw from the global generator
        teacher = resnet34(num_classes=num_classes)
    teacher = teacher.to_empty(device="cpu")
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(
            f"teacher {spec} is not a torchvision ResNet-34 state dict: {reason[:200]}"
        ) from error
    return teacher.eval().requires_grad_(False)


def _check_classes(spec: str, teacher: int, data: int) -> None:
    if teacher != data:
        raise UserError(
            f"teacher {spec} has {teacher} classes and the data have {data}:"
            " use --teacher none, or a ResNet-34 trained on these classes"
        )
