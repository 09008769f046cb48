"""The order of classes, and what to say where two lists of them differ."""

import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from tritonbnn.cli import UserError

logger = logging.getLogger(__name__)


def _by_number(names: Iterable[str]) -> list[str]:
    names = list(names)
    odd = next((name for name in names if not _is_number(name)), None)
    if odd is not None:
        raise UserError(f"class {odd} is no whole number: leave out --class-order numeric")
    return sorted(names, key=lambda name: (int(name), name))


CLASS_ORDERS: dict[str, Callable[[Iterable[str]], list[str]]] = {
    "name": sorted,  # as torchvision's ImageFolder: "10" comes before "2"
    "numeric": _by_number,
}


def warn_of_numbers(classes: Sequence[str]) -> None:
    """Warn where classes are numbers in the order of text.

    To be called where weights come from elsewhere: they may count the classes as numbers, and
    nothing else would show that each stands for another one.
    """
    if all(map(_is_number, classes)) and list(classes) != _by_number(classes):
        logger.warning(
            "the classes are numbers in the order of text: %s, ...; if the weights count them as"
            " numbers, pass --class-order numeric",
            ", ".join(classes[:4]),
        )


def odd_class(ours: Iterable[str], theirs: Iterable[str], here: str, there: str) -> str | None:
    """A phrase that names the first class that only one list has; None where both have the same.

    Args:
        ours, theirs: names of classes.
        here, there: what holds them, for the phrase.
    """
    ours, theirs = set(ours), set(theirs)
    odd = sorted(ours ^ theirs)
    if not odd:
        return None
    first = odd[0]
    where, others = (here, theirs) if first in ours else (there, ours)
    for other in others:
        # both would print as one word, and the message as nonsense
        if _composed(other) == _composed(first):
            place = there if where == here else here
            return (
                f"{len(odd)} (the first: {first}, whose accents are {_form(first)} in {where} and"
                f" {_form(other)} in {place}: rename one)"
            )
    return f"{len(odd)} (the first: {first}, only in {where})"


def other_order(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """A phrase that names the first place where two lists of the same classes differ, or None."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return f"class number {number} is {b} there, and {a} in the data"
    return None


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _form(name: str) -> str:
    return "composed (NFC)" if _composed(name) == name else "decomposed (NFD)"
