"""A packed network as one page for a browser, which asks for nothing from outside.

The network is the C program of :mod:`tritonbnn.deploy.program`, compiled to WebAssembly. Pictures
are resized as ``predict`` does it.
"""

import base64
import hashlib
import string
import zlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tritonbnn.data.images import MOST_PIXELS
from tritonbnn.data.views import AUGMENTATIONS
from tritonbnn.deploy import file, program
from tritonbnn.deploy.packed import Packed, PackedError
from tritonbnn.deploy.page import wasm
from tritonbnn.files import write_atomically

_FOLDER = Path(__file__).parent
_PYTHON_S = string.digits + string.ascii_uppercase + string.ascii_lowercase  # base64.b85encode's
_PYTHON_S += "!#$%&()*+-;<=>?@^_`{|}~"
_ALPHABET = "".join(c for c in map(chr, range(33, 127)) if c not in "<>&\"'\\`")[:85]
"""None of these means anything in HTML."""


def write(packed: Packed, path: Path) -> int:
    """Write a page; returns its bytes.

    Raises:
        PackedError: the network does not tell how a picture becomes its input.
        tritonbnn.cli.UserError: the page cannot be written, another's file is there, or there is
            no compiler for WebAssembly.
    """
    program.check_ours(path)
    content = page(packed, f"{path.stem}: what is in the picture?").encode(errors="replace")
    write_atomically(path, content)
    return len(content)


def page(packed: Packed, title: str) -> str:
    """The page as HTML.

    Raises:
        PackedError: the network does not tell how a picture becomes its input.
        tritonbnn.cli.UserError: there is no compiler for WebAssembly.
    """
    facts = _facts(packed)
    network = zlib.compress(wasm.library(packed), 9)
    script = "".join((_FOLDER / name).read_text("utf-8") for name in ("resize.js", "page.js"))
    style = (_FOLDER / "page.css").read_text("utf-8")
    size, floats = len(file.encode(packed)), 4 * file.numbers(packed)
    names = facts["classes"]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            marker=program.MARKER,
            title=title,
            classes=f"{len(names)} {'class' if len(names) == 1 else 'classes'}",
            size=_megabytes(size),
            floats=_megabytes(floats),
            times=f"{floats / size:.1f}",
            facts={**facts, "bytes": len(network), "alphabet": _ALPHABET},
            network=_text85(network),
            # both are of this package, and hold no end of their element
            script=Markup(script),
            style=Markup(style),
            script_hash=_hash(script),
            style_hash=_hash(style),
        )
    )


def _facts(packed: Packed) -> dict[str, Any]:
    """What the page's script knows of the network."""
    transform, count = packed.transform or {}, len(packed.head_weight)
    size, augment = program.image_size(packed), transform.get("augment", "none")
    if transform.get("mean") is None or size is None or augment not in AUGMENTATIONS:
        raise PackedError(
            "it does not tell how pictures become its input: export it from a run, or with a"
            " transform of mean, std and image_size"
        )
    if packed.in_channels not in (1, 3):
        raise PackedError(f"a page shows colour or grey, and it has {packed.in_channels} channels")
    return {
        "classes": packed.classes or [f"class {i}" for i in range(count)],
        "channels": packed.in_channels,
        "size": size,
        "shorter": round(size * AUGMENTATIONS[augment].margin),
        "mostPixels": MOST_PIXELS,
    }


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tritonbnn.deploy.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def _text85(content: bytes) -> str:
    """Five characters for four bytes, where base64 has six."""
    padded = content + bytes(-len(content) % 4)
    return base64.b85encode(padded).decode().translate(str.maketrans(_PYTHON_S, _ALPHABET))


def _hash(text: str) -> str:
    """What the page's policy calls the one script, or the one style, that counts."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
