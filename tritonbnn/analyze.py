"""``python -m tritonbnn.analyze RUN [RUN...]``: why runs trained as they did, as one HTML page."""

import logging
import shlex
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tritonbnn import caches, cli
from tritonbnn.cli import Parser, UserError, at_least, printable
from tritonbnn.compute import PRECISIONS, Compute, choose_device
from tritonbnn.files import make_folder, write_atomically
from tritonbnn.report.measure import Wanted, measure
from tritonbnn.report.read import read_runs

if TYPE_CHECKING:
    from tritonbnn.report.catalogue import Picture

logger = logging.getLogger("tritonbnn.analyze")

_NAME = "analysis.html"


def main(argv: list[str]) -> int:
    """Write the report. Returns the exit code."""
    given = _parser().parse_args(argv)
    caches.prepare(caches.MATPLOTLIB)  # which looks for its folder when it is imported
    from tritonbnn.report.catalogue import draw
    from tritonbnn.report.page import Made, compare, page

    made = Made(
        datetime.now().astimezone(), shlex.join(["python", "-m", "tritonbnn.analyze", *argv])
    )
    runs = read_runs(given.runs)
    wanted = _wanted(given)
    out = given.out or runs[0].path / _NAME
    pictures_folder = _places(out)
    measured = [measure(run, wanted) for run in runs]
    for note in compare(runs) + [note for run in runs for note in run.notes]:
        logger.warning("%s", note)
    pictures = draw(runs, measured)
    _write_pictures(pictures, pictures_folder)
    html = page(runs, measured, pictures, made)
    write_atomically(out, html.encode(errors="backslashreplace"))
    print(printable(f"{out}: {len(pictures)} pictures, also in {pictures_folder}"))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.analyze", description=__doc__)
    parser.add_argument("runs", type=cli.path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=cli.path,
        metavar="FILE.html",
        help=f"the page (default: {_NAME} in the first RUN)",
    )
    parser.add_argument(
        "--landscape",
        type=_points,
        default=11,
        metavar="N",
        help="loss landscape on N x N points, N odd; 0 leaves it out",
    )
    parser.add_argument("--images", type=at_least(2), default=128, help="of the landscape's batch")
    parser.add_argument(
        "--confusion",
        action=BooleanOptionalAction,
        default=True,
        help="count what the network confuses on all validation images",
    )
    parser.add_argument("--data-dir", type=cli.path, help="where the data are now")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp32", help="of activations"
    )
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images")
    return parser


def _points(text: str) -> int:
    points = at_least(0)(text)
    if points and (points < 3 or points % 2 == 0):
        raise ArgumentTypeError(f"must be odd and at least 3, or 0, not {points}")
    return points


def _wanted(given: Namespace) -> Wanted:
    return Wanted(
        points=given.landscape,
        images=given.images,
        confusion=given.confusion,
        compute=Compute(choose_device(given.device), given.precision),
        data_dir=given.data_dir,
        workers=given.workers,
    )


def _places(out: Path) -> Path:
    """The folder of the pictures; it is made at once, so that no work is lost to a bad ``out``."""
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"--out {out} must be a file whose name ends in .html")
    pictures = out.with_suffix("")
    for folder in (out.parent, pictures):
        make_folder(folder)
    return pictures


def _write_pictures(pictures: "list[Picture]", folder: Path) -> None:
    """Beside the page, in the place of an earlier page's."""
    from tritonbnn.report.catalogue import CATALOGUE

    for name, *_ in CATALOGUE:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.png)


if __name__ == "__main__":
    cli.run(main)
