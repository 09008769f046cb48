"""The file of a packed network: safetensors, its facts as JSON in the header, and a checksum.

Reading one runs no code and trusts no number in it.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tritonbnn.cli import UserError
from tritonbnn.deploy.packed import Array, Packed, PackedError, Unit, check
from tritonbnn.files import write_atomically

FORMAT = 1
SUFFIX = ".tbnn"
_FACTS = "tritonbnn-packed"
_UNIT_NUMBERS = ("channels", "out_channels", "kernel_size", "stride", "shortcut")
_UNIT_ARRAYS = tuple(f.name for f in fields(Unit) if f.name not in _UNIT_NUMBERS)
_NUMBERS = ("in_channels", "size_multiple", "stem_stride", "stem_pools", "transform")
_ARRAYS = ("stem_weight", "stem_offset", "head_weight", "head_offset")
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


def encode(packed: Packed) -> bytes:
    """The bytes of a packed file."""
    arrays = {name: np.ascontiguousarray(array) for name, array in packed.arrays()}
    facts = {
        "format": FORMAT,
        **{name: getattr(packed, name) for name in _NUMBERS},
        "classes": None if packed.classes is None else list(packed.classes),
        "units": [{name: getattr(u, name) for name in _UNIT_NUMBERS} for u in packed.units],
    }
    facts["checksum"] = _checksum(facts, arrays)
    return save(arrays, metadata={_FACTS: json.dumps(facts)})


def write(packed: Packed, path: Path) -> int:
    """Write a packed file; returns its bytes.

    Raises:
        UserError: it cannot be written.
    """
    content = encode(packed)
    write_atomically(path, content)
    return len(content)


def is_packed(path: Path) -> bool:
    """Whether a path names a packed file, by its first bytes."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 4096))
    except OSError:
        return False
    return _FACTS.encode() in header


def read(path: Path) -> Packed:
    """Read a packed file.

    Raises:
        UserError: there is none, it is damaged, of a newer version, or none of ours.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a packed file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return decode(content)
    except PackedError as error:
        raise UserError(f"{path}: {error}") from error


def decode(content: bytes) -> Packed:
    """A packed network from the bytes of a file.

    Raises:
        PackedError: they are damaged, of a newer version, or none of ours.
    """
    facts = _facts(content)
    if facts.get("format") != FORMAT:
        version = facts.get("format")
        if type(version) is int and version > FORMAT:
            raise PackedError(f"format {version} is newer than this tritonbnn reads: upgrade it")
        raise PackedError("it is no packed network: export one with python -m tritonbnn.export")
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise PackedError("it is damaged: export it again") from error
    checksum = facts.pop("checksum", None)
    if checksum != _checksum(facts, arrays):
        raise PackedError("it is damaged, its checksum is wrong: export it again")
    try:
        packed = _build(facts, arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise PackedError("it lacks a part of a packed network: export it again") from error
    check(packed)
    return packed


def _facts(content: bytes) -> dict[str, Any]:
    """The facts in a file's header.

    Raises:
        PackedError: there are none.
    """
    if not content:
        raise PackedError("it is empty: export it again")
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, _LONGEST_HEADER):
        raise PackedError("it is truncated, or no packed network: export it again")
    try:
        header = json.loads(content[8 : 8 + length])
        facts = json.loads(header["__metadata__"][_FACTS])
    # a hostile nest of brackets is a RecursionError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackedError(
            "it is no packed network: export one with python -m tritonbnn.export"
        ) from error
    if not isinstance(facts, dict):
        raise PackedError("it is no packed network: export one with python -m tritonbnn.export")
    return facts


def _build(facts: dict[str, Any], arrays: dict[str, Array]) -> Packed:
    left: dict[str, Any] = dict(arrays)
    units = tuple(
        Unit(
            **{name: unit[name] for name in _UNIT_NUMBERS},
            **{name: left.pop(f"units.{index}.{name}", None) for name in _UNIT_ARRAYS},
        )
        for index, unit in enumerate(facts["units"])
    )
    classes = facts["classes"]
    packed = Packed(
        units=units,
        classes=None if classes is None else tuple(classes),
        **{name: facts[name] for name in _NUMBERS},
        **{name: left.pop(name) for name in _ARRAYS},
    )
    if left:
        raise PackedError(f"it holds {min(left)!r}, which no network has: export it again"[:200])
    if type(packed.stem_pools) is not bool:
        raise PackedError("stem_pools must be true or false")
    if packed.transform is not None and not isinstance(packed.transform, dict):
        raise PackedError("the transform must be an object")
    return packed


def _checksum(facts: dict[str, Any], arrays: dict[str, Array]) -> str:
    """Of all facts and numbers. Facts are written in one way, whatever their order in a file."""
    told = {key: value for key, value in facts.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode(errors="replace"))
        digest.update(array.tobytes())
    return digest.hexdigest()


def parts(packed: Packed) -> dict[str, int]:
    """Bytes of a network's packed weights, of its vectors, and of its real ends."""
    sizes = {"packed weights": 0, "vectors": 0, "stem and head": 0}
    for name, array in packed.arrays():
        kind = "stem and head"
        if name.startswith("units."):
            kind = "packed weights" if name.endswith(".weight") else "vectors"
        sizes[kind] += array.nbytes
    return sizes


def numbers(packed: Packed) -> int:
    """How many numbers the network has where each weight is one, rather than a bit."""
    bits = sum(u.out_channels * u.channels * u.kernel_size**2 for u in packed.units)
    return bits + sum(array.size for name, array in packed.arrays() if array.dtype != "uint8")
