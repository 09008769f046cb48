"""The file format of a checkpoint: one safetensors file, its facts as JSON in the header.

Reading one runs no code. A checksum over the tensors finds damage that leaves the length alone.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tritonbnn.cli import UserError
from tritonbnn.files import utf_8_name

# The files in a step's folder: where to go on, where before that, and the best weights.
LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
BEST = "best.safetensors"

_FORMAT = 1
FACTS = "tritonbnn"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: where it was read from.
        tensors: by dotted name; ``model.`` leads those of the network.
        facts: everything else, as JSON knows it.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix.``, by the rest of their name."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def encode(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file."""
    # safetensors knows no strides: a channels_last tensor is stored as NCHW
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": _FORMAT, "checksum": _checksum(plain), **facts}
    return save(plain, metadata={FACTS: json.dumps(header)})


def read(path: Path) -> Checkpoint:
    """Read a checkpoint file.

    Raises:
        UserError: there is none, it is damaged, or it is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with utf_8_name(path) as name, safe_open(name, framework="pt") as file:
            header = (file.metadata() or {})[FACTS]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(header)
        whole = facts["format"] == _FORMAT and facts["checksum"] == _checksum(tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if not whole:
        raise _damaged(path)
    return Checkpoint(path, tensors, facts)


def has_begun(folder: Path) -> bool:
    """Whether a step's folder holds a state to go on from."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def _damaged(path: Path) -> UserError:
    what = "is empty" if not path.stat().st_size else "is damaged, or not a checkpoint of tritonbnn"
    return UserError(f"{path} {what}: use another checkpoint")


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return checksum
