"""Splits whose images lie in one folder, with a file that says the class of each.

So ImageNet's validation images are published, and Tiny ImageNet's.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tritonbnn.cli import UserError
from tritonbnn.data.images import is_image

KNOWN_LABELS = (
    "val_annotations.txt",  # Tiny ImageNet
    "LOC_val_solution.csv",  # ImageNet as Kaggle hands it out
    "ILSVRC2012_validation_ground_truth.txt",  # the development kit: numbers, in the images' order
)
_KIT = Path("ILSVRC2012_devkit_t12") / "data"  # as the development kit is unpacked
_WORDNET_ID = re.compile(r"n\d{8}\b")
_MANY = 1000


def complain_of_flat(val: Path, folders: Sequence[str], classes: Sequence[str]) -> None:
    """Name the remedy where a split's images lie in one folder instead of class folders.

    Args:
        val: the split's folder.
        folders: what folders it has.
        classes: what it should have.

    Raises:
        UserError: so they lie.
    """
    if set(folders) & set(classes) or len(folders) > 1:
        return
    place = val / folders[0] if folders else val
    images = sum(1 for _ in zip(range(_MANY), flat_images(place), strict=False))
    if not images:
        return
    labels = find_labels(val)
    command = f"python -m tritonbnn.sort_val {shlex.quote(str(val))}"
    if labels:
        remedy = f"{command} puts them into class folders, as {labels.name} says"
    else:
        remedy = (
            f"{command} --labels FILE puts them into class folders; FILE says the class of each,"
            " as ImageNet's LOC_val_solution.csv does"
        )
    raise UserError(
        f"{place} has {images}{' or more' if images == _MANY else ''} images in one folder, without"
        f" class folders: {remedy}"
    )


def flat_images(place: Path) -> list[Path]:
    """The images that lie in a folder itself, in the order of their names."""
    return sorted(p for p in place.iterdir() if p.name[0] != "." and p.is_file() and _named(p))


def _named(path: Path) -> bool:
    return bool(path.suffix) and is_image(str(path))


def find_labels(val: Path) -> Path | None:
    """A file with the classes of a flat split, by its usual names: in its folder, or above."""
    places = (val, val.parent, val.parent / _KIT)
    return next((p / n for n in KNOWN_LABELS for p in places if (p / n).is_file()), None)


def read_labels(
    path: Path, images: Sequence[str], classes: Sequence[str] | None, names: Path | None
) -> list[str]:
    """The class of each image, as a text file says it.

    A line has the name of an image, with or without its suffix, and its class, separated by a tab,
    a comma or spaces; what follows is not read. Or it has a class alone, and the lines are in the
    order of the images' names.

    Args:
        path: the file.
        images: names of the images, sorted.
        classes: of the training split; None where there is none.
        names: a file with the classes that numbers from 1 on stand for, see :func:`class_names`.

    Raises:
        UserError: a file cannot be read, or does not fit the images and classes.
    """
    lines = [_words(line) for line in _read(path) if line.strip()]
    if lines and all(len(words) == 1 for words in lines):
        found = _by_order(path, [words[0] for words in lines], images)
    else:
        found = _by_name(path, lines, images)
    mine = names is None and classes is not None and set(found) <= set(classes)
    if not mine and all(label.isascii() and label.isdecimal() for label in found):
        found = _by_number(path, list(map(int, found)), names)
    if classes is not None and (odd := sorted(set(found) - set(classes))):
        raise UserError(
            f"{path} gives images the class {odd[0]}, which is not in train/: use the file that"
            " belongs to these images"
        )
    for label in found:
        if Path(label).name != label or label.startswith("."):
            raise UserError(f"{path} has the class {label!r}, which cannot name a folder")
    return found


def _words(line: str) -> list[str]:
    separator = next((mark for mark in "\t," if mark in line), None)
    words = [word.strip() for word in line.strip().split(separator)]
    # Kaggle's file goes on with boxes, and separates them by spaces
    return [m[0] if (m := _WORDNET_ID.match(word)) else word for word in words]


def class_names(path: Path) -> list[str]:
    """The classes that numbers from 1 on stand for.

    Args:
        path: a text whose line N begins with the name of class N, or ``meta.mat`` of ImageNet's
            development kit, which scipy reads.

    Raises:
        UserError: it cannot be read.
    """
    if path.suffix == ".mat":
        return _names_of_kit(path)
    lines = [line.split() for line in _read(path)]
    if not lines or not all(lines):
        raise UserError(f"{path} must have the name of a class in each line")
    return [words[0] for words in lines]


def _names_of_kit(path: Path) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"scipy reads {path}: pip install scipy, or give a text as --class-names, whose line N"
            " begins with the name of class N"
        ) from error
    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return [str(name) for _, name in sorted((int(n), str(name)) for n, name in pairs)]
    # its parser raises almost anything on damaged bytes
    except Exception as error:
        raise UserError(
            f"{path} is not meta.mat of ImageNet's development kit: unpack it again"
        ) from error


def _read(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: name a file with a line for each image") from error


def _by_order(path: Path, labels: list[str], images: Sequence[str]) -> list[str]:
    if len(labels) != len(images):
        raise UserError(
            f"{path} has {len(labels)} lines and there are {len(images)} images: lines without"
            " names need an image each"
        )
    return labels


def _by_name(path: Path, lines: list[list[str]], images: Sequence[str]) -> list[str]:
    known: dict[str, str] = {}
    for words in lines:
        name = Path(words[0]).name
        for key in {name, Path(name).stem} if len(words) > 1 else ():
            if known.setdefault(key, words[1]) != words[1]:
                raise UserError(f"{path} gives {name} two classes: {known[key]} and {words[1]}")
    found = []
    for image in images:
        label = known.get(image) or known.get(Path(image).stem)
        if label is None:
            raise UserError(f"{path} does not say the class of {image}: use a complete file")
        found.append(label)
    return found


def _by_number(path: Path, numbers: list[int], file: Path | None) -> list[str]:
    file = file or path.with_name("meta.mat")
    if not file.is_file():
        raise UserError(
            f"{path} says the classes as numbers: give --class-names FILE, which is meta.mat of"
            " ImageNet's development kit, or a text whose line N begins with the name of class N"
        )
    names = class_names(file)
    for number in numbers:
        if not 1 <= number <= len(names):
            raise UserError(
                f"{path} has the number {number}, and {file} names {len(names)} classes: use the"
                " file that belongs to these images"
            )
    return [names[number - 1] for number in numbers]
