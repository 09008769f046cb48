"""``python -m tritonbnn.export RUN|FILE --out net.tbnn``: write a trained network as a packed file.

FILE may also hold weights from elsewhere, AdamBNN's for one: ``model_best.pth.tar --step 2``.
``--out net.onnx`` writes a graph of floats, which ONNX Runtime and others run, ``--out net.c`` a
C program that needs no library, and ``--out net.html`` a page for a browser. Then FILE
may be a packed file too.
"""

import argparse
from pathlib import Path
from typing import Any

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, printable
from tritonbnn.data.sources import SOURCES, canonical
from tritonbnn.deploy import FORMATS, file, files, writer
from tritonbnn.deploy.fold import FoldError, fold
from tritonbnn.deploy.packed import Packed, PackedError
from tritonbnn.files import writable
from tritonbnn.networks import add_told, check_not_told
from tritonbnn.train.checkpoint import Checkpoint
from tritonbnn.train.weights import Told, network_with_weights, read_any

FLOAT_BYTES = 4


def main(argv: list[str]) -> int:
    """Write the file and report its size. Returns the exit code."""
    given = _parser().parse_args(argv)
    format = _format(given)
    out = _place(given.out, FORMATS[format])
    write = writer(format)
    packed = _packed(given, format)
    try:
        size = write(packed, out)
    except PackedError as error:
        raise UserError(f"{given.checkpoint}: {error}") from error
    print("\n".join(report(files(format, out), size, packed)))
    return 0


def _format(given: argparse.Namespace) -> str:
    """What --format says, or else the end of --out."""
    of_suffix = {suffix: name for name, suffix in FORMATS.items()}
    said = of_suffix.get(given.out.suffix.lower())
    if given.format and said and given.format != said:
        raise UserError(f"--format {given.format} and --out {given.out} name two formats")
    return given.format or said or "packed"


def _place(out: Path, suffix: str) -> Path:
    """The file to write. What is there and is no such file is somebody's: it stays."""
    if not (out.suffix or out.is_dir() or _is_special(out)):
        out = out.with_suffix(suffix)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it")
    if out.is_file() and out.suffix.lower() not in FORMATS.values():
        raise UserError(f"--out {out} exists and ends in none of {', '.join(FORMATS.values())}")
    writable(out)
    return out


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, beside which nobody wants a file."""
    return path.exists() and not path.is_file()


def _packed(given: argparse.Namespace, format: str) -> Packed:
    """What is named on the command line, packed."""
    told = Told(given.step, given.recipe)
    if not (given.checkpoint.is_file() and file.is_packed(given.checkpoint)):
        return pack(read_any(given.checkpoint, told), half_ends=given.half_ends)
    check_not_told(given.checkpoint, told)
    if format == "packed":
        raise UserError(f"{given.checkpoint} is a packed file already: name a run or a checkpoint")
    if given.half_ends:
        raise UserError(f"--half-ends: {given.checkpoint} is packed already, with the ends it has")
    return file.read(given.checkpoint)


def pack(checkpoint: Checkpoint, *, half_ends: bool = False) -> Packed:
    """The packed network of a checkpoint.

    Raises:
        UserError: it cannot be packed, as one of step 1 cannot.
    """
    model = network_with_weights(checkpoint).eval()
    data: dict[str, Any] = dict(checkpoint.facts["data"])
    taken = SOURCES[canonical(data["name"])].normalisation
    transform = {**data, "mean": list(taken.mean), "std": list(taken.std)}
    classes = transform.pop("classes", None)
    try:
        return fold(model, classes=classes, transform=transform, half_ends=half_ends)
    except FoldError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error


def report(paths: list[Path], size: int, packed: Packed) -> list[str]:
    """Lines that say how large the files are, of what, and how large its floats would be."""
    parts = file.parts(packed)
    floats = FLOAT_BYTES * file.numbers(packed)
    rows = [f"{', '.join(printable(path) for path in paths)}: {_megabytes(size)}"]
    rows += [f"  {name:15} {_megabytes(count):>10}" for name, count in parts.items()]
    rows.append(f"as float32: {_megabytes(floats)}, {floats / size:.1f} times as much")
    return rows


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.export", description=__doc__)
    parser.add_argument(
        "checkpoint", type=cli.path, metavar="RUN|FILE", help="a run's folder, or a checkpoint file"
    )
    parser.add_argument("--out", type=cli.path, required=True, help="the file to write")
    parser.add_argument(
        "--format", choices=FORMATS, help="by default what --out ends in says it; else packed"
    )
    add_told(parser)
    parser.add_argument(
        "--half-ends", action="store_true", help="keep the stem and the head in float16"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
