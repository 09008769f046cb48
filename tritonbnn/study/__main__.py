"""``python -m tritonbnn.study optimizers|decay|steps``: the paper's comparisons, small.

Every run is a folder under --out, named by how and from which seed it is trained; the studies share
them, and a killed study goes on where it stopped. --epochs are those of each of the two steps; one
step gets the sum of both.
"""

import io
import json
import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, at_least
from tritonbnn.distributed import launched
from tritonbnn.files import make_folder, update
from tritonbnn.study.plan import STAGES, STUDIES, VARIED, Variant
from tritonbnn.study.summary import Results, markdown, measured, settings
from tritonbnn.train.__main__ import main as train
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import with_stage
from tritonbnn.train.config import Config, differences
from tritonbnn.train.log import LOG, Line
from tritonbnn.train.recipe import read_recipe, resolve
from tritonbnn.train.rundir import CONFIG

logger = logging.getLogger("tritonbnn.study")


@dataclass(frozen=True)
class Run:
    """One training command of a grid."""

    variant: Variant
    seed: int
    folder: Path
    argv: list[str]

    def log(self) -> list[Line]:
        """The lines of its log."""
        lines = (self.folder / LOG).read_text().splitlines()
        return [with_stage(json.loads(line)) for line in lines]


def main(argv: list[str]) -> int:
    """Train what is missing, then compare. Returns the exit code."""
    given, flags = _parser().parse_known_args(argv)
    config = _checked(given, flags)
    out = given.out or Path(f"runs/study-{config.recipe}")
    runs = list(_grid(given, flags, config, out))
    logging.getLogger("tritonbnn.train").setLevel(logging.WARNING)
    results: Results = {}
    failed: dict[str, str] = {}
    with tqdm(runs, unit="run", disable=None) as bar:
        for run in bar:
            bar.set_description(run.folder.name)
            code, reason = _train(run.argv)
            if code:
                return code
            if reason:
                failed[run.folder.name] = reason
                tqdm.write(f"{run.folder.name} failed: {reason}", file=sys.stderr)
                continue
            values = measured(run.log())
            results.setdefault(run.variant.name, {})[run.seed] = values
            tqdm.write(f"{run.folder.name}: top-1 {values['top1']:.2f} %", file=sys.stderr)
    _report(given, config, out, results, failed)
    return 1 if failed else 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tritonbnn.study",
        description="Repeat AdamBNN's comparisons at a small scale.",
        epilog="Any other flag goes to python -m tritonbnn.train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "studies", nargs="+", choices=list(STUDIES), metavar="STUDY", help=", ".join(STUDIES)
    )
    parser.add_argument("--recipe", default="digits", help="as for training")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many, from 0")
    parser.add_argument("--sgd-lr", type=float, default=0.025, help="learning rate of SGD")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/study-RECIPE)")
    return parser


def _checked(given: Namespace, flags: list[str]) -> Config:
    """The configuration that all runs vary."""
    if "--fresh" in flags:
        raise UserError("--fresh has no meaning for a grid: choose another --out")
    for flag in flags:
        if flag.partition("=")[0] in VARIED:
            raise UserError(f"{flag} is what a study sets itself: leave it out")
    if launched():
        raise UserError("a study trains one run at a time in one process: start without torchrun")
    config = parse([given.recipe, *flags]).config
    if config.names != STAGES:
        raise UserError(f"a study wants a recipe with the stages {' and '.join(STAGES)}")
    if config.analysis == "off":
        raise UserError("--analysis off leaves nothing to compare: leave it out")
    return config


def _grid(given: Namespace, flags: list[str], config: Config, out: Path) -> Iterator[Run]:
    """All runs of the studies, each once, seed by seed; a wrong flag is found before the first."""
    variants = dict.fromkeys(v for name in given.studies for v in STUDIES[name].variants)
    for seed in range(given.seeds):
        for variant in variants:
            folder = out / f"{variant.name}-seed{seed}"
            own = [*variant.flags(config, given.sgd_lr), "--seed", str(seed), "--out", str(folder)]
            argv = [given.recipe, *flags, *own]
            _check_same(folder, parse(argv).config)
            yield Run(variant, seed, folder, argv)


def _check_same(folder: Path, config: Config) -> None:
    """Refuse a folder of another grid before the first run, and before its report is replaced."""
    path = folder / CONFIG
    if not path.exists():
        return
    before = resolve(read_recipe(str(path)))
    # the other way round, epochs may not grow: longer runs are no part of the same grid
    if changed := differences(before, config) or differences(config, before):
        raise UserError(
            f"{folder} is a run with other settings: {'; '.join(changed)};"
            " repeat the old ones to go on, or choose another --out"
        )


def _train(argv: list[str]) -> tuple[int, str]:
    """Train, or go on: the exit code if the run was asked to stop, and the reason if it failed."""
    try:
        with redirect_stdout(io.StringIO()):
            return train(argv), ""
    except UserError as error:
        return 0, str(error)
    except Exception as error:  # one broken run must not cost the others
        logger.exception("python -m tritonbnn.train %s", shlex.join(argv))
        return 0, f"{type(error).__name__}: {error}"


def _report(
    given: Namespace, config: Config, out: Path, results: Results, failed: dict[str, str]
) -> None:
    """Write ``study.json`` and ``study.md``, and print the latter."""
    studies = list(dict.fromkeys(given.studies))
    trained = settings(config, given.seeds, given.sgd_lr)
    document = {"settings": trained, "studies": studies, "results": results, "failed": failed}
    text = markdown(studies, results, failed, trained)
    make_folder(out)
    update(out / "study.json", (json.dumps(document, indent=2) + "\n").encode())
    update(out / "study.md", text.encode(errors="backslashreplace"))
    print(text)


if __name__ == "__main__":
    cli.run(main)
