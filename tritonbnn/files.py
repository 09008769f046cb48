"""Files that are either whole or absent, and a folder that only one process writes to."""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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

    Two who write the same path at once do so one after the other.

    Raises:
        UserError: the disk is full, or the file cannot be written; ``path`` is as it was.
    """
    try:
        _check_plain(path)
        with _beside(path) as temporary:
            temporary.write(content)
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.place()
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Replace several files of a folder; none of them before all are on the disk.

    Raises:
        UserError: the disk is full, or a file cannot be written; then none is changed, unless it
            is a rename that fails.
    """
    writing = Path()
    try:
        with ExitStack() as held:
            temporaries = []
            for writing in sorted(contents):  # two who write the same files do not hold each other
                _check_plain(writing)
                temporaries.append(held.enter_context(_beside(writing)))
                temporaries[-1].write(contents[writing])
            for temporary in temporaries:
                writing = temporary.path
                temporary.place()
        for folder in {path.parent for path in contents}:
            _sync_folder(folder)
    except OSError as error:
        raise cannot_write(writing, error) from error


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
    try:
        _check_plain(path)
        with _beside(path) as temporary:
            temporary.write(b"")
    except OSError as error:
        raise cannot_write(path, error) from error
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


class _Temporary:
    """The file beside ``path`` that shall take its place, held for one writer.

    Attributes:
        path: the place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = path.with_name(path.name + _TEMPORARY)
        self._descriptor = _open_locked(self._name)
        while not _is_at(self._descriptor, self._name):  # who had it has put it in its place
            os.close(self._descriptor)
            self._descriptor = _open_locked(self._name)
        self._placed = False

    def write(self, content: bytes) -> None:
        """Put all of it on the disk."""
        os.truncate(self._descriptor, 0)  # a death in the middle of a write leaves a part
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)

    def place(self) -> None:
        """Put it in its place, which ends the writing."""
        if fcntl is None:
            self._close()  # Windows moves no open file
        self._name.replace(self.path)
        self._placed = True

    def end(self) -> None:
        """Let others write. What was not put in its place is removed."""
        if not self._placed:
            with suppress(OSError):  # somebody else has removed it
                self._name.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    # a child that was forked meanwhile has the file open, and would hold it on
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def _beside(path: Path) -> Iterator[_Temporary]:
    """The temporary file of a path. Whoever else writes the same path waits for its end."""
    temporary = _Temporary(path)
    try:
        yield temporary
    finally:
        temporary.end()


def _open_locked(name: Path) -> int:
    """Open a file, and wait until no other thread or process has it locked."""
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT, 0o666)
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_at(descriptor: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), name.stat())
    except FileNotFoundError:
        return False


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
