"""What is to be trained: every row with every seed, checked before the first run starts."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonbnn.cli import UserError
from tritonbnn.compare.sets import Claim, Row, read
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import has_begun, stage_folder
from tritonbnn.train.config import SHARED_FIELDS, STAGE_FIELDS, Config, differences
from tritonbnn.train.log import LOG
from tritonbnn.train.recipe import read_recipe, resolve, stage_names
from tritonbnn.train.run_folder import CONFIG, ENVIRONMENT, code_version

_SWITCHES = {
    key.replace("_", "-")
    for key, spec in {**SHARED_FIELDS, **STAGE_FIELDS}.items()
    if spec.type is bool
}
_OURS = ("seed", "out", "fresh", "stage", "step")  # flags of the trainer that a grid sets
_SAME = {"step": "stage", "init-from": "start", "teacher": "method"}  # two names of one thing


@dataclass(frozen=True)
class Run:
    """One training command of the grid.

    Attributes:
        row: whose it is.
        seed: of the run.
        folder: where it goes.
        argv: of the trainer.
        config: what that means.
    """

    row: Row
    seed: int
    folder: Path
    argv: list[str]
    config: Config

    @property
    def name(self) -> str:
        """For people."""
        return self.folder.name


@dataclass(frozen=True)
class Plan:
    """All that a comparison needs to know before it trains.

    Attributes:
        titles: of the sets in it.
        rows: in the order of the table.
        claims: of all sets.
        configs: of every row, by its name.
        runs: seed by seed, so that a stopped comparison has all rows.
    """

    titles: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    configs: dict[str, Config]
    runs: list[Run]


def split_flags(argv: Sequence[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """Part a comparison's own words from flags of the trainer, wherever they stand.

    Args:
        argv: all of them.
        own: flags that are not the trainer's.
    """
    mine: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name in own:
            mine.append(word)
            continue
        flags.append(word)
        is_switch = name.removeprefix("--").removeprefix("no-") in _SWITCHES
        if not equals and not is_switch:
            value = next(words, None)
            if value is None:
                raise UserError(f"argument {name}: expected one argument (see --help)")
            flags.append(value)
    return mine, flags


def make_plan(
    words: Sequence[str],
    flags: list[str],
    *,
    seeds: int,
    out: Path,
    recipe: str | None = None,
    total_epochs: int | None = None,
    more: Sequence[Row] = (),
) -> Plan:
    """Read and check everything.

    Args:
        words: recipes and sets.
        flags: of the trainer, for every row.
        seeds: how many, from 0.
        out: folder of the runs.
        recipe: takes the place of the sets' own.
        total_epochs: over all stages of each row.
        more: rows that no file names.

    Raises:
        UserError: something is no recipe, is there twice, does not go together or cannot be parsed.
    """
    sets = [read(word, recipe) for word in words]
    if recipe and not any(each.title for each in sets):
        raise UserError("--recipe is for sets, and only recipes are named: leave it out")
    rows = _distinct([row for each in sets for row in each.rows], words)
    rows += [row for row in more if row not in rows]
    if total_epochs is not None:
        rows = [dataclasses.replace(row, total_epochs=total_epochs) for row in rows]
    for row in rows:
        _check_flags(row, flags)
    configs: dict[str, Config] = {}
    runs = []
    for seed in range(seeds):
        for row in rows:
            folder = out / f"{row.name}-seed{seed}"
            run = _run(row, seed, folder, flags)
            configs.setdefault(row.name, run.config)
            runs.append(run)
    _check_comparable(rows, configs)
    claims = tuple(dict.fromkeys(claim for each in sets for claim in each.claims))
    titles = tuple(dict.fromkeys(each.title for each in sets if each.title))
    return Plan(titles, tuple(rows), claims, configs, runs)


def _distinct(rows: list[Row], words: Sequence[str]) -> list[Row]:
    """Rows that two sets share, once; a recipe that is named twice is a slip."""
    for word in words:
        if words.count(word) > 1:
            raise UserError(f"{word} is named twice: name each recipe or set once")
    found: dict[str, Row] = {}
    for row in rows:
        if found.setdefault(row.name, row) != row:
            raise UserError(f"two recipes are called {row.name}: rename one of the files")
    return list(found.values())


def _check_flags(row: Row, flags: list[str]) -> None:
    """Refuse a flag that the grid or the row sets itself."""
    own = {_what(flag) for flag in row.flags if flag.startswith("--")}
    if row.total_epochs is not None:
        own.add("epochs")
    for flag in flags:
        if not flag.startswith("--"):
            continue
        name, what = flag.partition("=")[0], _what(flag)
        if name in [f"--{key}" for key in _OURS]:
            raise UserError(f"{name} is what a comparison sets itself: leave it out")
        if what in own:
            instead = "use --total-epochs" if what == "epochs" else "leave it out"
            raise UserError(f"{name} is what row {row.name} sets itself: {instead}")


def _what(flag: str) -> str:
    """What a flag sets, of whichever stage."""
    key = flag.partition("=")[0].removeprefix("--").rpartition(".")[2]
    return _SAME.get(key, key)


def _run(row: Row, seed: int, folder: Path, flags: list[str]) -> Run:
    argv = [row.recipe, *flags, *row.flags]
    try:
        if row.total_epochs is not None:
            argv += _epochs(parse(argv).config, row.total_epochs)
        argv += ["--seed", str(seed), "--out", str(folder)]
        return Run(row, seed, folder, argv, parse(argv).config)
    except UserError as error:
        raise UserError(f"{row.name}: {error}") from error


def _epochs(config: Config, total: int) -> list[str]:
    """Flags that make all stages of a run take so many epochs together, in the recipe's shares."""
    whole = sum(stage.epochs for stage in config.chosen)
    flags = []
    for stage in config.chosen:
        epochs, rest = divmod(total * stage.epochs, whole)
        if rest or not epochs:
            raise UserError(
                f"{total} epochs do not split over its stages, which have"
                f" {' + '.join(str(each.epochs) for each in config.chosen)}: choose a multiple"
            )
        flags += [f"--{stage.name}.epochs", str(epochs)]
    return flags


def _check_comparable(rows: Sequence[Row], configs: dict[str, Config]) -> None:
    """All rows must be of the same images, and no two the same run."""
    for index, row in enumerate(rows):
        own = configs[row.name]
        for other in rows[:index]:
            theirs = configs[other.name]
            for key in ("dataset", "data_dir"):
                ours_is, theirs_is = getattr(own, key), getattr(theirs, key)
                if ours_is != theirs_is:
                    raise UserError(
                        f"{row.name} has {key} {ours_is or 'none'} and {other.name} has"
                        f" {theirs_is or 'none'}: scores on different images do not compare"
                    )
            same = dataclasses.replace(theirs, recipe=own.recipe) == own
            if same and row.module == other.module:
                raise UserError(f"{row.name} and {other.name} are the same run: leave one out")


def check_begun(run: Run) -> None:
    """Refuse a folder of another run, or of other code, before anything is trained.

    Raises:
        UserError: it is one.
    """
    begun = (run.folder / LOG).exists() or any(
        has_begun(stage_folder(run.folder, name)) for name in stage_names(run.folder)
    )
    if not begun:  # before, nothing is lost
        return
    remedy = "choose another --out, or start over with --fresh"
    try:
        before = resolve(read_recipe(str(run.folder / CONFIG)))
        code = json.loads((run.folder / ENVIRONMENT).read_text("utf-8")).get("code")
    except (UserError, OSError, ValueError, AttributeError) as error:
        raise UserError(f"{run.folder} is no run that can be read ({error}): {remedy}") from error
    # the other way round, epochs may not grow: longer runs are no part of the same comparison
    if changed := differences(before, run.config) or differences(run.config, before):
        raise UserError(
            f"{run.folder} is a run with other settings: {'; '.join(changed)}; {remedy}"
        )
    if code != code_version():
        raise UserError(
            f"{run.folder} is a run of other code ({code or 'unknown'} and not {code_version()}):"
            f" {remedy}"
        )
