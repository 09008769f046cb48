"""A packed network as a C program: one C99 file, its header, and a test of both.

The C file holds the engine's own sources, one after the other, and the network's arrays as these
read them. So there is one engine, and the file needs no library.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from tritonbnn.cli import UserError
from tritonbnn.deploy.native import SOURCES, NativeNetwork
from tritonbnn.deploy.order import (
    NETWORK_NUMBERS,
    UNIT_NUMBERS,
    OrderedNetwork,
    OrderedUnit,
    byte_table,
    in_order,
)
from tritonbnn.deploy.packed import Array, Packed
from tritonbnn.deploy.plain import PlainNetwork
from tritonbnn.files import write_together

MARKER = "Written by python -m tritonbnn.export: do not edit, export again."
"""Stands in the first line of each file. Another's file is not overwritten."""
_SIDE = 224  # of the test's image where the network does not know its images' size
_UNITS = ("layout.c", "ends.c", "engine.c")  # what calls another comes after it


def paths(out: Path) -> list[Path]:
    """The C file, the header and the test of a C file's path."""
    return [out, out.with_suffix(".h"), out.with_name(f"{out.stem}_test.c")]


def prefix(out: Path) -> str:
    """What the C names of a file's network begin with: the file's name.

    Raises:
        UserError: it cannot begin a C name, or names of the engine begin with it.
    """
    name = out.stem
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*\.c", out.name):
        raise UserError(
            f"{out.name} names C functions: use a letter, then letters, digits and _, and .c at"
            " the end, as in net.c"
        )
    words = re.findall(r"\w+", engine())
    if any(word.lower().startswith(f"{name.lower()}_") for word in words):
        raise UserError(f"names in the engine begin with {name}_: choose another name than {out}")
    return name


def engine() -> str:
    """The engine's C sources as one file, each header once."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        content = (SOURCES / name).read_text("utf-8")
        return re.sub(r'^#include "(.+)"\n', lambda found: text(found[1]), content, flags=re.M)

    return "\n".join(text(name) for name in _UNITS)


def write(packed: Packed, path: Path) -> int:
    """Write the C file, the header and the test; returns their bytes.

    Raises:
        tritonbnn.cli.UserError: a file cannot be written, another's file is there, or the name
            gives no C names. None is written then.
    """
    first, names = prefix(path), paths(path)
    for name in names:
        check_ours(name)
    texts = (*sources(packed, first), test(packed, first))
    contents = [text.encode() for text in texts]
    write_together(dict(zip(names, contents, strict=True)))
    return sum(map(len, contents))


def check_ours(path: Path) -> None:
    """Raise UserError where there is a file that no export has written."""
    if path.exists() and not path.is_file():
        return  # a pipe would keep a reader waiting: whoever writes says that it is none
    try:
        with path.open("rb") as file:
            ours = MARKER.encode() in file.read(400)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not ours:
        raise UserError(f"{path} exists and was not written by an export: name another --out")


def sources(packed: Packed, prefix: str) -> tuple[str, str]:
    """The texts of the C file and of the header.

    Args:
        packed: checked.
        prefix: what all names that others see begin with.
    """
    count = len(packed.head_weight)
    names = [str(i) for i in range(count)] if packed.classes is None else packed.classes
    header = {
        "classes": count,
        "channels": packed.in_channels,
        "size_multiple": packed.size_multiple,
        "image_size": image_size(packed),
        "named": packed.classes is not None,
    }
    network = {"names": map(_string, names), "engine": engine(), **_network(packed)}
    return (
        _render("net.c", packed, prefix, network),
        _render("net.h", packed, prefix, header),
    )


def test(packed: Packed, prefix: str) -> str:
    """The text of the test, whose logits the engine computes now."""
    return _render("test.c", packed, prefix, _expected(packed))


def _render(name: str, packed: Packed, prefix: str, facts: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("tritonbnn.deploy.program", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    named = {"marker": MARKER, "prefix": prefix, "upper": prefix.upper()}
    normalises = byte_table(packed) is not None
    return environment.get_template(f"{name}.jinja").render(**named, normalises=normalises, **facts)


def image_size(packed: Packed) -> int | None:
    """Of the images that the network was trained for, where that is known."""
    size = (packed.transform or {}).get("image_size")
    fits = type(size) is int and 0 < size < 1 << 14 and size % packed.size_multiple == 0
    return size if fits else None


def _network(packed: Packed) -> dict[str, Any]:
    """The arrays as texts, and the structures of ``csrc/engine.h`` that point to them."""
    ordered = in_order(packed)
    arrays: list[dict[str, Any]] = []

    def floats(name: str, array: Array | None, type: str = "float") -> str:
        if array is None:
            return "{NULL, 0}"
        arrays.append({"name": name, "type": type, "pairs": array.size // 2, "text": _bits(array)})
        return f"{{{name}.numbers, {array.size}}}"

    units = []
    for index, unit in enumerate(ordered.units):
        numbers = _numbers(unit, UNIT_NUMBERS)
        weight = floats(f"weight_{index}", unit.weight, "uint32_t").strip("{}")
        rest = [
            floats(f"{name}_{index}", getattr(unit, name))
            for name in ("whole", "vectors", "projection")
        ]
        units.append(f"{{{numbers}, {weight}, {', '.join(rest)}}}")
    table = byte_table(packed)
    transform = packed.transform or {}
    return {
        "stem": floats("stem", ordered.stem),
        "head": floats("head", ordered.head),
        "table": None if table is None else floats("byte_table", table),
        "mean": _vector(transform.get("mean")),
        "std": _vector(transform.get("std")),
        "arrays": arrays,
        "units": units,
        "numbers": _numbers(ordered, NETWORK_NUMBERS),
    }


def _numbers(of: OrderedNetwork | OrderedUnit, names: tuple[str, ...]) -> str:
    return ", ".join(str(getattr(of, name)) for name in names)


def _bits(array: Array) -> str:
    """Numbers of 4 bytes as C has the bits of two at a time."""
    pairs = array.astype(array.dtype.newbyteorder("<")).ravel().view("<u8").tolist()
    return _lines([f"{pair:#x}" for pair in pairs], 5)


def _vector(numbers: list[float] | Array | None) -> str:
    """float32 numbers as C has them, which lose no bit."""
    if numbers is None:
        return ""
    return _lines([f"{float(number)!r}f" for number in np.asarray(numbers, np.float32)], 4)


def _lines(words: list[str], on_a_line: int) -> str:
    rows = (words[i : i + on_a_line] for i in range(0, len(words), on_a_line))
    return ",\n".join(",".join(row) for row in rows)


def _string(text: str) -> str:
    """A C string of a text in UTF-8: what is not plain is octal, and no ``?`` begins a trigraph."""
    plain = set(map(ord, " !#$%&'()*+,-./:;<=>@[]^_`{|}~")) | set(b"0123456789")
    plain |= set(range(ord("A"), ord("Z") + 1)) | set(range(ord("a"), ord("z") + 1))
    content = text.replace("\0", "\ufffd").encode(errors="replace")  # 0 would end it
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in content) + '"'


def _expected(packed: Packed) -> dict[str, Any]:
    """The test's image size, and the logits of its image as numbers and as pixels."""
    multiple = packed.size_multiple
    side = image_size(packed) or max(_SIDE // multiple, 1) * multiple
    pixels = random_bytes(packed.in_channels * side**2).reshape(1, -1, side, side)
    numbers = pixels.astype(np.float32) % 9 - 4
    table, run = byte_table(packed), reference(packed)
    return {
        "side": side,
        "logits": _vector(run(numbers, None, 1)[0]),
        "byte_logits": "" if table is None else _vector(run(pixels, table, 1)[0]),
    }


def reference(packed: Packed) -> Callable[[Array, Array | None, int], Array]:
    """What runs a network as the C file does, where no product and sum are rounded as one.

    That is so in the baseline's build of the engine, on x86. One rounding more or less turns the
    sign of a number near 0, and a network of millions of numbers has some of these.
    """
    try:
        return NativeNetwork(packed, "generic").logits
    except RuntimeError:  # no compiler
        return PlainNetwork(packed).logits


def random_bytes(count: int) -> Array:
    """The bytes of the test's image, as ``random_byte`` in ``test.c.jinja`` makes them."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
    y = (x ^ x >> 15) * np.uint32(2246822519)
    return ((y ^ y >> 13) & 255).astype(np.uint8)
