"""The README's results and the pictures, from the result files.

python -m benchmarks.report
python -m benchmarks.report --check        # fails where README.md differs from the files
"""

import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.pictures import draw
from benchmarks.tables import (
    BATCH_SWEEP,
    SIZE_SWEEP,
    Device,
    overhead_line,
    peak_line,
    runs_table,
    steps_table,
    study_table,
    sweep_table,
)
from tritonbnn import cli
from tritonbnn.train.files import update

BEGIN = "<!-- Results: written by python -m benchmarks.report -->"
END = "<!-- End of the results -->"
NO_GPU = (
    "### GPU",
    "",
    "Not measured yet: `make gpu` on a machine that has one measures all of it and writes it here.",
    "",
)


def devices(folder: Path) -> list[Device]:
    """The devices that there are results of, GPUs first; tiny runs are no results.

    Raises:
        cli.UserError: there is no such folder, or a file is damaged.
    """
    if not folder.is_dir():
        raise cli.UserError(f"{folder} is not a folder: choose another --results")
    found = [
        Device(path)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith("tiny-")
    ]
    return sorted(found, key=lambda device: device.is_cpu)


def results_text(found: list[Device], base: Path) -> str:
    """What stands between the markers.

    Args:
        found: the devices.
        base: the README's folder, for links to pictures.
    """
    lines = [BEGIN, ""]
    if all(device.is_cpu for device in found):
        lines += NO_GPU
    for device in found:
        lines += [f"### {device.title}", "", *steps_table(device), *peak_line(device)]
        lines += sweep_table(device, BATCH_SWEEP, "batch")
        lines += sweep_table(device, SIZE_SWEEP, "size")
        lines += [*runs_table(device), *study_table(device), *overhead_line(device)]
        for path in sorted(device.folder.glob("*.svg")):
            where = path.resolve().relative_to(base.resolve())
            lines += [f"![{path.stem.replace('_', ' ')}]({where})", ""]
    return "\n".join([*lines, END])


def inserted(readme: str, results: str) -> str:
    """The README with new results between its markers.

    Raises:
        cli.UserError: it has no markers.
    """
    before, found, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise cli.UserError(f"the README needs the lines {BEGIN} and {END}")
    return before + results + after


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; say if it differs")
    args = parser.parse_args(argv)
    found = devices(args.results)
    try:
        readme = args.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise cli.UserError(f"cannot read {args.readme}: {error.strerror}") from error
    if not args.check:
        for device in found:
            draw(device)
    text = inserted(readme, results_text(found, args.readme.parent))
    if args.check and text != readme:
        print(
            f"{args.readme} differs from the result files: run python -m benchmarks.report",
            file=sys.stderr,
        )
        return 1
    if not args.check:
        update(args.readme, text.encode())
    return 0


if __name__ == "__main__":
    cli.run(main)
