"""``python -m tritonbnn.sort_val VAL``: give a flat validation split its class folders.

ImageNet's validation images are published in one folder, and so are Tiny ImageNet's. A file says
the class of each. Training needs a folder for each class. This command makes these folders of hard
links, so that no image is copied. The old folder stays, and is called VAL-flat from then on.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

from tritonbnn import cli
from tritonbnn.cli import Parser, UserError, printable
from tritonbnn.data.flat import find_labels, flat_images, read_labels

_SORTING = "-sorting"  # while the links are made
_FLAT = "-flat"


def main(argv: list[str]) -> int:
    """Sort the images. Returns the exit code."""
    given = _parser().parse_args(argv)
    try:
        _sort(given.val, given.labels, given.class_names, given.out)
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename}: {error.strerror}") from error
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m tritonbnn.sort_val", description=__doc__)
    parser.add_argument("val", type=cli.path, metavar="VAL", help="the folder with the images")
    parser.add_argument(
        "--labels",
        type=cli.path,
        metavar="FILE",
        help="lines of IMAGE CLASS, or of classes alone in the images' order; not needed where"
        " val_annotations.txt, LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt lies"
        " in VAL or above",
    )
    parser.add_argument(
        "--class-names",
        type=cli.path,
        metavar="FILE",
        help="where the labels are numbers from 1 on: line N begins with the name of class N, or"
        " meta.mat of ImageNet's development kit",
    )
    parser.add_argument(
        "--out", type=cli.path, help="make the class folders here, and leave VAL as it is"
    )
    return parser


def _sort(val: Path, labels: Path | None, names: Path | None, out: Path | None) -> None:
    # a link to the folder stays one: hard links can only be made where the images are
    real = val.resolve()
    flat = real.with_name(real.name + _FLAT)
    _check_folders(real, flat, out)
    place, images = _images(real)
    labels = labels or find_labels(val)
    if labels is None:
        raise UserError(
            f"no file near {val} says the classes of its images: give one as --labels FILE"
        )
    train = val.parent / "train"
    classes = [p.name for p in train.iterdir() if p.is_dir()] if train.is_dir() else None
    found = read_labels(labels, [path.name for path in images], classes, names)
    result = out or real
    made = result.with_name(result.name + _SORTING)
    if made.exists():  # of a call that was interrupted
        shutil.rmtree(made)
    _link(images, found, made)
    if out is None:
        real.rename(flat)
    made.rename(result)
    counts = Counter(found)
    print(
        printable(
            f"{out or val}: {len(images)} images in {len(counts)} class folders,"
            f" {min(counts.values())} to {max(counts.values())} each, as hard links to those in"
            f" {place if out else flat / place.relative_to(real)}"
        )
    )


def _check_folders(val: Path, flat: Path, out: Path | None) -> None:
    if not val.is_dir() and flat.is_dir():
        raise UserError(
            f"{val} does not exist and {flat} does: an earlier call was interrupted: rename {flat}"
            f" to {val} and call again"
        )
    if not val.is_dir():
        raise UserError(f"{val} is not a folder: name the one with the images")
    if out is not None and out.exists():
        raise UserError(f"{out} exists: choose another --out")
    if out is None and flat.exists():
        raise UserError(f"{flat} exists: rename it, or choose another place by --out")


def _images(val: Path) -> tuple[Path, list[Path]]:
    """The folder with the images, which is the split's or the only one in it, and the images."""
    folders = [path for path in val.iterdir() if path.is_dir() and path.name[0] != "."]
    images = flat_images(val)
    if images and not folders:
        return val, images
    if not images and len(folders) == 1:
        images = flat_images(folders[0])
        if images:
            return folders[0], images
    if folders and not images:
        raise UserError(f"{val} has {len(folders)} folders and no images: it seems to be sorted")
    raise UserError(
        f"{val} must hold images and no folders, or one folder of images: it has {len(images)}"
        f" images and {len(folders)} folders"
    )


def _link(images: list[Path], labels: list[str], made: Path) -> None:
    for path, label in zip(images, labels, strict=True):
        (made / label).mkdir(parents=True, exist_ok=True)
        try:
            (made / label / path.name).hardlink_to(path)
        except OSError as error:
            shutil.rmtree(made)
            raise UserError(
                f"cannot make a hard link to {path} in {made}: {os.strerror(error.errno or 0)}:"
                " choose an --out on the same disk as the images, of a kind that has hard links"
            ) from error


if __name__ == "__main__":
    cli.run(main)
