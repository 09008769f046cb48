"""Files that are either whole or absent, and a folder that only one process writes to."""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tritonbnn.cli import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_LOCK = ".lock"


def write_atomically(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Replace ``path`` by ``content``, so that a death at any moment leaves one or other.

    Args:
        path: the file.
        content: what it shall hold.
        keep: where the old file goes. For a moment there may be ``keep`` and no ``path``.

    Raises:
        UserError: the disk is full, or the file cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        _check_plain(path)
        _write_synced(temporary, content)
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Replace several files of a folder; none of them before all are on the disk.

    Raises:
        UserError: the disk is full, or a file cannot be written; then none is changed, unless it
            is a rename that fails.
    """
    temporaries = {path: path.with_name(path.name + _TEMPORARY) for path in contents}
    writing = None
    try:
        for writing, content in contents.items():
            _check_plain(writing)
            _write_synced(temporaries[writing], content)
        for writing, temporary in temporaries.items():
            temporary.replace(writing)
        for folder in {path.parent for path in contents}:
            _sync_folder(folder)
    except OSError as error:
        raise cannot_write(writing or Path(), error) from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # in its place already, or never written
                temporary.unlink()


def update(path: Path, content: bytes) -> None:
    """:func:`write_atomically`, unless the file says so already: a full disk is no matter then."""
    if not (path.is_file() and path.read_bytes() == content):
        write_atomically(path, content)


def write_json(path: Path, content: Any) -> None:
    """:func:`write_atomically` of JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def writable(path: Path | None) -> Path | None:
    """``path``, its folder made: before the work whose result it shall hold.

    Raises:
        UserError: a file cannot be put there.
    """
    if path is None:
        return None
    make_folder(path.parent)
    _check_plain(path)
    probe = path.with_name(path.name + ".probe")
    try:
        write_atomically(probe, b"")
    finally:
        with suppress(OSError):  # not written at all
            probe.unlink()
    return path


@contextmanager
def utf_8_name(path: Path) -> Iterator[str]:
    """A name of an existing file for those who refuse any that is not UTF-8, as safetensors does.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The user's view of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left to write {path}: free some and run the same command again;"
            " what was saved before is intact"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _check_plain(path: Path) -> None:
    """A rename would put a file in the place of a device: of /dev/null for the whole system."""
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise UserError(f"cannot write {path}: it is a {kind}; name a file")


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where a folder can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` if need be.

    Raises:
        UserError: something else is in its place, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{error.filename} is a file, not a folder: choose another --out"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot create {folder}: {error.strerror}; choose another --out"
        ) from error


class FolderLock:
    """Holds a folder for this process until it ends, however it ends.

    A POSIX record lock: unlike one from ``flock`` it is not inherited by the processes that read
    images, which may outlive a killed trainer by seconds. On a system without such locks nothing is
    held, and a line says so.

    Args:
        folder: an existing folder.

    Raises:
        UserError: another process holds it, or it is not writable.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / _LOCK
        try:
            # a bare descriptor: Python would complain of a file that is open to the end
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; choose another --out"
            ) from error
        if fcntl is None:
            logger.warning("this system has no locks: start no second run in %s", folder)
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 100).decode(errors="replace").strip() or "unknown"
            self.release()
            raise UserError(
                f"{folder} is in use by another running process (pid {owner}):"
                " wait for it, or choose another --out"
            ) from error
        with suppress(OSError):  # a full disk: only the message to others lacks it
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the folder back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_leftovers(files: Iterable[Path]) -> None:
    """Remove what a death in the middle of a write of these files left behind, and nothing else."""
    for path in files:
        with suppress(OSError):  # a folder of that name: who writes the file says so
            path.with_name(path.name + _TEMPORARY).unlink()
