"""Recipe sets: TOML files that name the rows of a table and the orders that a paper found.

::

    title = "SGD and Adam"
    recipe = "digits"            # of every row that names none of its own
    total_epochs = 32            # over all stages of a row

    [[row]]
    name = "sgd"
    title = "two steps, SGD"     # for people; the name where it is left out
    flags = "--optimizer sgd"    # as for python -m tritonbnn.train
    published = { top1 = 63.23 } # what the paper has, by quantity

    [[claim]]
    text = "Adam is more accurate than SGD"
    quantity = "top1"
    rising = ["sgd", "adam"]     # rows, the least first
"""

import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tritonbnn.cli import UserError
from tritonbnn.settings import choose_from, did_you_mean
from tritonbnn.train.recipe import shipped_recipes

QUANTITIES = {
    "top1": ("top-1, %", 1.0),
    "loss": ("loss", 1.0),
    "flip_flop": ("FF ratio, 1e-3", 1e3),
    "flip_flop_sampled": ("FF ratio (sampled), 1e-3", 1e3),
    "c2i_half": ("C2I (2p - 1)", 1.0),
    "saturation": ("saturation, %", 100.0),
    "dead": ("dead, %", 100.0),
    "revived": ("revived, %", 100.0),
    "minutes": ("minutes", 1.0),
}
"""What is measured of a run: its heading in a table, and what it is multiplied by there."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
TRAINER = "tritonbnn.train.__main__"


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: its runs' folders begin with it.
        recipe: a shipped recipe's name, or a file.
        title: for people.
        flags: of the trainer, for this row alone.
        total_epochs: over all stages; None leaves them as the recipe has them.
        published: a paper's values, by quantity.
        module: whose ``main`` trains it.
    """

    name: str
    recipe: str
    title: str
    flags: tuple[str, ...] = ()
    total_epochs: int | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    module: str = TRAINER


@dataclass(frozen=True)
class Claim:
    """An order that somebody found.

    Attributes:
        text: what it says.
        quantity: one of :data:`QUANTITIES`.
        rising: names of rows, the least first.
    """

    text: str
    quantity: str
    rising: tuple[str, ...]


@dataclass(frozen=True)
class RecipeSet:
    """The rows of a table, and what they should show."""

    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()


def shipped_sets() -> list[str]:
    """Names of the sets in the package."""
    folder = resources.files("tritonbnn.compare") / "sets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def read(word: str, recipe: str | None = None) -> RecipeSet:
    """A set by its name or file; a recipe is a set of one row without claims.

    Args:
        word: of the command line.
        recipe: takes the place of the set's own.

    Raises:
        UserError: there is none, or it says something that makes no set.
    """
    if word in shipped_sets():
        text = (resources.files("tritonbnn.compare") / "sets" / f"{word}.toml").read_text("utf-8")
        return _parsed(word, tomllib.loads(text), Path(), recipe)
    if os.sep in word or word.endswith(".toml"):
        try:
            content = tomllib.loads(Path(word).read_text("utf-8", errors="surrogateescape"))
        except (OSError, ValueError, RecursionError):
            content = {}  # who reads recipes says what is wrong
        if "row" in content:
            return _parsed(word, content, Path(word).parent, recipe)
    elif word not in shipped_recipes():
        known = [*shipped_recipes(), *shipped_sets()]
        raise UserError(
            f"unknown recipe or set {word!r}: {choose_from(word, known)}, or name a .toml file"
        )
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", Path(word).stem)
    return RecipeSet("", (Row(name, word, name),))


def _parsed(word: str, content: dict[str, Any], base: Path, recipe: str | None) -> RecipeSet:
    where = f"set {word}"
    top = _Table(content, where, ("title", "recipe", "total_epochs", "row", "claim"))
    default = recipe or _path(top.text("recipe", ""), base)
    total = top.get("total_epochs", int, None)
    if total is not None and total < 1:
        raise UserError(f"{where}: total_epochs must be at least 1, not {total}")
    rows = tuple(_row(t, where, default, base, total, recipe) for t in top.tables("row"))
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where} has two rows {name!r}: give each a name of its own")
    claims = tuple(_claim(table, where, names) for table in top.tables("claim"))
    return RecipeSet(top.text("title", Path(word).stem), rows, claims)


def _row(
    content: Any, where: str, default: str, base: Path, total: int | None, given: str | None
) -> Row:
    table = _Table(content, f"{where}: a row", ("name", "title", "recipe", "flags", "published"))
    name = table.text("name", "")
    if not _NAME.fullmatch(name):
        raise UserError(f"{where} has a row named {name!r}: give one of letters, digits and -_.+")
    recipe = given or _path(table.text("recipe", ""), base) or default
    if not recipe:
        raise UserError(f"{where}: row {name} has no recipe: name one there or for all rows")
    published = table.get("published", dict, {})
    for key, value in published.items():
        if key not in QUANTITIES or not isinstance(value, int | float):
            raise UserError(f"{where}: published {key}: give numbers of {', '.join(QUANTITIES)}")
    try:
        flags = tuple(shlex.split(table.text("flags", "")))
    except ValueError as error:
        raise UserError(f"{where}: flags of row {name} cannot be read: {error}") from error
    return Row(name, recipe, table.text("title", name), flags, total, published)


def _claim(content: Any, where: str, names: Iterable[str]) -> Claim:
    table = _Table(content, f"{where}: a claim", ("text", "quantity", "rising"))
    quantity, rising = table.text("quantity", "top1"), table.get("rising", list, [])
    if quantity not in QUANTITIES:
        raise UserError(f"{where}: quantity {quantity}: {choose_from(quantity, QUANTITIES)}")
    for name in rising:
        if name not in names:
            raise UserError(f"{where}: a claim is about {name!r}, which is no row of it")
    if len(set(rising)) != len(rising) or len(rising) < 2:
        raise UserError(f"{where}: a claim needs two rows or more in rising, each once")
    text = table.text("text", "") or " < ".join(rising)
    return Claim(text, quantity, tuple(rising))


def _path(recipe: str, base: Path) -> str:
    """A recipe's file is looked for beside the set."""
    return str(base / recipe) if recipe.endswith(".toml") else recipe


class _Table:
    """A TOML table whose keys and kinds are checked."""

    def __init__(self, content: Any, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(content, dict):
            raise UserError(f"{where} must be a table, not {content!r}")
        self._content, self._where = content, where
        for key in content:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self._content.get(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{self._where}: {key} is {value!r}, which is no {kind.__name__}")
        return value

    def text(self, key: str, default: str) -> str:
        return self.get(key, str, default)

    def tables(self, key: str) -> list[Any]:
        return self.get(key, list, [])
