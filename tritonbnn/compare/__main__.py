"""``python -m tritonbnn.compare A B ... --seeds 3``: recipes side by side, several seeds each.

Every run is a folder of its own under --out. The same command goes on where it was stopped, and
does not train again what is finished.
"""

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tritonbnn import caches, cli
from tritonbnn.cli import Parser, UserError, at_least, printable
from tritonbnn.compare.page import Result, markdown, summary
from tritonbnn.compare.plan import Plan, check_begun, make_plan, split_flags
from tritonbnn.compare.runs import is_finished, log_of, measured, train
from tritonbnn.compare.sets import Row, shipped_sets
from tritonbnn.compare.statistics import MOST_SEEDS
from tritonbnn.distributed import launched
from tritonbnn.files import FolderLock, make_folder, update, writable, write_atomically, write_json
from tritonbnn.stop import Stopped, StopSignals
from tritonbnn.train.recipe import shipped_recipes
from tritonbnn.train.run_folder import check_outside_images, code_version, numbered

logger = logging.getLogger("tritonbnn.compare")

NAME = "compare"
FAILED = 1


def main(argv: list[str], more: Sequence[Row] = (), header: dict[str, Any] | None = None) -> int:
    """Train what is missing, then compare.

    Args:
        argv: the command line.
        more: rows that no recipe names.
        header: what stands above the results in JSON.

    Returns:
        The exit code.
    """
    given, flags = parse(argv)
    if launched():
        raise UserError("a comparison starts its runs one by one: start it without torchrun")
    out = given.out or Path("runs") / f"compare-{'-'.join(Path(w).stem for w in given.recipes)}"
    out = numbered(out) if given.fresh else out
    path = writable(_json(given.json))
    plan = make_plan(
        given.recipes,
        flags,
        seeds=given.seeds,
        out=out,
        recipe=given.recipe,
        total_epochs=given.total_epochs,
        more=more,
    )
    for config in plan.configs.values():
        check_outside_images(out, config)
    make_folder(out)
    _lock = FolderLock(out)  # held to the end of this process
    for run in plan.runs:
        check_begun(run)
    if given.seeds < 2:
        logger.warning("one seed shows no spread, so it decides nothing: take --seeds 3 or more")
    try:
        with StopSignals() as signals:
            result = _train_all(plan, given.seeds, signals)
    except Stopped as stopped:
        logger.info(
            "stopped by %s; all is saved in %s: run the same command again to go on",
            *(stopped.signal.name, out),
        )
        return stopped.code
    command = shlex.join(["python", "-m", "tritonbnn.compare", *argv])
    head = header or {"command": command}
    _write(result, {**head, "code": code_version()}, out, path)
    return FAILED if result.failed else 0


def _json(path: Path | None) -> Path | None:
    """What is there and is no JSON file is somebody's, as a recipe: it stays."""
    if path and path.is_file() and path.suffix.lower() != ".json":
        raise UserError(f"--json {path} exists and does not end in .json: name another file")
    return path


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """A comparison's own arguments, and flags of the trainer."""
    parser = Parser(
        prog="python -m tritonbnn.compare",
        description="Train recipes with several seeds each, and say what the seeds decide.",
        epilog="Any other flag goes to python -m tritonbnn.train, for every recipe: --epochs,"
        " --width, --device, --data-dir and so on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help=f"recipes ({', '.join(shipped_recipes())}), sets of recipes with a paper's claims"
        f" ({', '.join(shipped_sets())}), or .toml files of either",
    )
    parser.add_argument("--seeds", type=at_least(1, MOST_SEEDS), default=3, help="how many, from 0")
    parser.add_argument(
        "--out", type=cli.path, help="folder of the runs (default: runs/compare-...)"
    )
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--total-epochs",
        type=at_least(1),
        metavar="INT",
        help="of all stages of a recipe together, shared among them as the recipe shares its own",
    )
    parser.add_argument("--recipe", metavar="NAME", help="in place of the recipe of the sets")
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder beside the old one"
    )
    own = [name for action in parser._actions for name in action.option_strings]
    mine, flags = split_flags(argv, own)
    return parser.parse_args(mine), flags


def _train_all(plan: Plan, seeds: int, signals: StopSignals) -> Result:
    """Train every run that is not finished, whatever becomes of the others."""
    rows = {
        row.name: {
            "title": row.title,
            "recipe": plan.configs[row.name].recipe,
            "model": plan.configs[row.name].model,
            "width": plan.configs[row.name].width,
            "batch_size": plan.configs[row.name].batch_size,
            "epochs": {stage.name: stage.epochs for stage in plan.configs[row.name].chosen},
            "published": dict(row.published),
        }
        for row in plan.rows
    }
    result = Result(list(plan.titles), rows, list(plan.claims), seeds, {name: {} for name in rows})
    with tqdm(plan.runs, unit="run", disable=None) as bar:
        for run in bar:
            bar.set_description(run.name)
            reason = "" if is_finished(run) else train(run, signals)
            if signals.number:
                raise Stopped(signals.number)
            if reason:
                result.failed[run.name] = reason
                tqdm.write(printable(f"{run.name} failed: {reason}"), file=sys.stderr)
                continue
            values = measured(log_of(run), [stage.name for stage in run.config.chosen])
            result.values[run.row.name][str(run.seed)] = values
            score = f"top-1 {values['top1']:.2f} %" if "top1" in values else f"{values['loss']:.4g}"
            tqdm.write(f"{run.name}: {score}", file=sys.stderr)
    return result


def _write(result: Result, header: dict[str, Any], out: Path, path: Path | None) -> None:
    """The result as JSON, as text and as a picture in ``out``, and the text on stdout."""
    caches.prepare(caches.MATPLOTLIB)  # which looks for its folder when it is imported
    from tritonbnn.compare.picture import draw

    document = {**header, **result.document(), "summary": summary(result)}
    for file in {out / f"{NAME}.json", *([path] if path else [])}:
        write_json(file, document)
    text = markdown(result)
    update(out / f"{NAME}.md", text.encode(errors="backslashreplace"))
    if picture := draw(result):
        write_atomically(out / f"{NAME}.png", picture)
    print(text)
    print(printable(f"{out / NAME}.json, .md and .png hold the same."))


if __name__ == "__main__":
    cli.run(main)
