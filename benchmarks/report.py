"""The README's table, the tables of docs/, and the pictures, from the result files.

python -m benchmarks.report
python -m benchmarks.report --check        # fails where either page differs from the files
"""

import os
import sys
from pathlib import Path

from benchmarks import deploy_table
from benchmarks.headline import FIGURES, headline
from benchmarks.machine import ROOT
from benchmarks.pictures import draw
from benchmarks.tables import (
    BATCH_SWEEP,
    DIGITS_FILES,
    MAX_AUTOTUNE_FILES,
    ONE_THREAD_FILES,
    SIZE_SWEEP,
    STEP_FILES,
    Device,
    layers_table,
    overhead_line,
    peak_table,
    runs_tables,
    steps_table,
    sweep_table,
)
from tritonbnn import cli
from tritonbnn.files import update

BEGIN = "<!-- Results: written by python -m benchmarks.report -->"
END = "<!-- End of the results -->"
NO_GPU = "Not measured on a GPU yet: `make gpu` on a machine that has one measures all of it."
PREFACE = f"""<!-- Written by python -m benchmarks.report from the result files. -->

# Results

The rivals of a training step, which is forward, backward and fused Adam:

- **ours** is `tritonbnn`. "recompute" is the plan that keeps least for backward, and "unfused" is
  made of separate operators.
- **expert** is `benchmarks/expert.py`: plain torch, with the sign and the scaled sign written as
  two autograd Functions in a dozen lines. It is the rival that counts.
- **twin** is `benchmarks/twin.py`: the same layers with real weights and real activations.
- **obvious** is `benchmarks/baseline.py`: float masks and separate modules, what the public code
  does.

In step 1 weights are real, in step 2 they are 1-bit. Rivals of one table take turns. On a CPU each
has a process of its own that keeps freed memory, as the trainer does. The first step of a turn is
not timed.

- **ms** is measured: the median of the rounds, ± half their range.
- **thread-ms** is measured: the time that all threads of the process worked or waited busily.
- **MB kept** is counted: bytes that autograd holds for backward, as the slope between two batch
  sizes. For a compiled network it is counted where torch.compile has decided what is kept, before
  it makes code.
- A dash stands where nothing was measured.

Every file in `benchmarks/results/` has its machine, versions, commit and command. What the README's
table shows is measured again by `make gpu`, or without a GPU by
`{FIGURES}`.
"""


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


def shown(found: list[Device]) -> list[Device]:
    """Those of the README: every GPU, and one CPU, if it can be one with the expert measured."""
    cpus = [device for device in found if device.is_cpu]
    best = max(cpus, key=lambda device: "expert" in device.rows(2), default=None)
    return [device for device in found if not device.is_cpu or device is best]


def results_text(found: list[Device]) -> str:
    """What stands between the README's markers."""
    lines = [BEGIN, ""]
    if all(device.is_cpu for device in found):
        lines += [NO_GPU, ""]
    for device in shown(found):
        lines += [f"**{device.title}**", "", *headline(device)]
    return "\n".join([*lines, END])


def results_page(found: list[Device], base: Path) -> str:
    """All tables and pictures of all devices.

    Args:
        found: the devices.
        base: the page's folder, for links to pictures.
    """
    lines = [PREFACE]
    for device in found:
        lines += [f"## {device.title}", ""]
        for files in (STEP_FILES, MAX_AUTOTUNE_FILES, DIGITS_FILES, ONE_THREAD_FILES):
            tables = [line for name in files.values() for line in steps_table(device, name)]
            lines += [*_title(files), *tables] if tables else []
        lines += layers_table(device)
        lines += peak_table(device)
        lines += sweep_table(device, BATCH_SWEEP, "batch")
        lines += sweep_table(device, SIZE_SWEEP, "size")
        lines += [*runs_tables(device), *overhead_line(device)]
        for path in sorted(device.folder.glob("*.svg")):
            where = Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()
            lines += [f"![{path.stem.replace('_', ' ')}]({where})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _title(files: dict[int, str]) -> list[str]:
    """A heading above the tables of some files."""
    titles = {
        "train_step": "A training step",
        "train_step_max_autotune": "A training step, compiled with max-autotune",
        "train_step_digits": "A training step of the digits recipe",
        "train_step_digits_1_thread": "A training step of the digits recipe, on one thread",
    }
    name = files[1].removesuffix(".json").replace("_1", "", 1)
    return [f"### {titles[name]}", ""]


def inserted(page: Path, results: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with new results between its markers, which are the results' own ends.

    Raises:
        cli.UserError: there is no such page, or it has no markers.
    """
    text = _text(page)
    if text is None:
        raise cli.UserError(f"cannot read {page}: there is no such file")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise cli.UserError(f"{page} needs the lines {begin} and {end}")
    return before + results + after


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--deploy-page", type=Path, default=ROOT / "docs" / "deploy.md")
    parser.add_argument("--check", action="store_true", help="write nothing; say if one differs")
    args = parser.parse_args(argv)
    found = devices(args.results)
    if not args.check:
        for device in found:
            draw(device)
    pages = {
        args.readme: inserted(args.readme, results_text(found)),
        args.page: results_page(found, args.page.parent),
        args.deploy_page: inserted(
            args.deploy_page,
            deploy_table.measured(found, args.deploy_page.parent),
            deploy_table.BEGIN,
            deploy_table.END,
        ),
    }
    stale = [path for path, text in pages.items() if _text(path) != text]
    if args.check and stale:
        names = " and ".join(str(path) for path in stale)
        print(f"stale: {names}: run python -m benchmarks.report", file=sys.stderr)
        return 1
    for path in stale:
        update(path, pages[path].encode())
    return 0


def _text(path: Path) -> str | None:
    """Of a file, or None where there is none.

    Raises:
        cli.UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cli.UserError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
