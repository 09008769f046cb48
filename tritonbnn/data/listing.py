"""Which image files lie below folders. Links are followed, but no folder is entered twice."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tritonbnn.data.images import is_image

logger = logging.getLogger(__name__)

_Identity = tuple[int, int]  # of a folder, whatever name or link leads to it
_KINDS_TOLD = 5
# Made by Synology's photo index, by macOS in archives, by Windows, and by a file system's repair.
_NOT_OF_THE_USER = (
    *("@eadir", "#recycle", "__macosx", "$recycle.bin"),
    *("system volume information", "lost+found"),
)


@dataclass
class Listing:
    """What was found below some folders of a root.

    Attributes:
        paths: for each folder by name, its images: encoded paths below the root, sorted.
        passed_over: how many files are no images, by suffix.
        left_out: how many folders a system made for itself were left out, by name.
        skipped_links: paths of the links to folders that were entered already.
    """

    paths: dict[str, list[bytes]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped_links: list[Path] = field(default_factory=list)

    def tell(self, root: Path) -> None:
        """Warn of what was left out, if anything was: a line for files, and one for links."""
        if self.passed_over or self.left_out:
            told = [f"{root}: {sum(map(len, self.paths.values()))} images"]
            if self.left_out:
                told.append(f"folders of the system left out: {_counted(self.left_out)}")
            if self.passed_over:
                told.append(f"other files passed over: {_counted(self.passed_over)}")
                told.append("convert those that are images")
            logger.warning("%s", "; ".join(told))
        if self.skipped_links:
            logger.warning(
                "%s: links not followed: %d (the first: %s), because they lead to folders that are"
                " listed anyway",
                *(root, len(self.skipped_links), self.skipped_links[0]),
            )


def is_left_out(folder: str) -> bool:
    """Whether a folder is hidden, or one that a system made for itself, by its name."""
    return folder.startswith(".") or folder.lower() in _NOT_OF_THE_USER


def _counted(kinds: Counter[str]) -> str:
    told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(_KINDS_TOLD))
    return f"{kinds.total()} ({told}{', ...' if len(kinds) > _KINDS_TOLD else ''})"


def list_images(root: Path, names: Iterable[str] = ("",)) -> Listing:
    """List the image files below folders of ``root``, without hidden ones and a system's own.

    A folder is entered once, however many links lead to it. Where it really lies below one of
    ``names``, it belongs to that one. A link to a folder around them is not followed: what is in
    there is listed by its own name, or was not meant.

    Args:
        root: the folder that paths are relative to.
        names: folders below it, or ``""`` for itself.

    Raises:
        OSError: A folder cannot be read.
    """
    return _Walk(root, list(names)).listing


class _Walk:
    def __init__(self, root: Path, names: list[str]) -> None:
        self._root = root
        self._entered = {
            _identity(around) for name in names for around in (root / name).resolve().parents
        }
        self.listing = Listing({name: [] for name in names})
        # All links wait until every real folder is entered: so a file's own place goes first.
        links = [(name, link) for name in names for link in self._enter(name, name)]
        for name, link in links:  # grows meanwhile
            links += [(name, deeper) for deeper in self._enter(name, link)]
        for paths in self.listing.paths.values():
            paths.sort()

    def _enter(self, name: str, top: str) -> list[str]:
        """Take what really lies below ``top`` for ``name``; the links to folders in there."""
        links: list[str] = []
        folders = [top]
        while folders:
            folder = folders.pop()
            path = self._root / folder
            identity = _identity(path)
            if identity in self._entered:
                self.listing.skipped_links.append(path)
                continue
            self._entered.add(identity)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    below = f"{folder}{os.sep}{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False) and is_left_out(entry.name):
                        self.listing.left_out[entry.name] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(below)
                    elif entry.is_symlink() and Path(entry.path).is_dir():
                        links.append(below)
                    else:
                        self._take(name, below, entry)
        return sorted(links)  # the order of a scan is not the same on every machine

    def _take(self, name: str, below: str, entry: os.DirEntry) -> None:
        if _is_special(entry):
            self.listing.passed_over["no plain file"] += 1
        elif is_image(entry.path):
            self.listing.paths[name].append(os.fsencode(below))
        else:
            suffix = Path(entry.name).suffix.lower()
            self.listing.passed_over[suffix or "no suffix"] += 1


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_special(entry: os.DirEntry) -> bool:
    """Whether it is a pipe, a socket or a device: to read one may never end.

    A link to nothing is none. Its name says what it should be, and its error is told when read.
    """
    if entry.is_file(follow_symlinks=False):
        return False
    path = Path(entry.path)
    return path.exists() and not path.is_file()
