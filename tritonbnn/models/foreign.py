"""Tensors out of files from elsewhere: torch.save's in all its forms, and safetensors.

No code in a file is run. What a trainer saved beside the weights, such as its arguments, numpy's
numbers or a whole optimizer, is passed over: an object that says nothing and does nothing stands in
for each thing of an unknown class.
"""

import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tritonbnn.files import utf_8_name

# of what torch.save writes: a zip, and before torch 1.6 a pickle
_BEGINNINGS = (b"PK", b"\x80")
_LENGTH = 8  # bytes of a safetensors file before its header, which is JSON
# Where trainers keep the weights, and what wrappers put before each name.
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile
_ATTRIBUTES = ("model.", "net.", "network.")  # a trainer's module that holds the network
_HARMLESS = ("builtins.", "collections.", "copyreg.", "torch._", "numpy.")
_DICT = "collections.defaultdict"
_OLD_PICKLES = 4  # of a file before torch 1.6: magic number, version, system, and the content


class _Beside:
    """Stands in for an object of a class that is not known, and does nothing."""

    name = ""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote the file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(_LENGTH + 1)
    # the length of a safetensors header may begin with the same byte as a pickle
    return beginning.startswith(_BEGINNINGS) and beginning[_LENGTH:] != b"{"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a file, on the CPU, by their bare names.

    Taken are a state dict, alone or as the entry ``state_dict``, ``model`` or the like of a larger
    checkpoint; with the prefixes of DataParallel and torch.compile, or without.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds no state dict of plain tensors. The message names the
            file, what is in the way, and where code would be needed, a line that converts it.
    """
    content = _read_torch(path) if is_torch_file(path) else _read_safetensors(path)
    return bare_names(str(path), _state_dict(path, content))


def bare_names(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes that wrappers put before its names.

    Args:
        name: of the state dict, for the message.
        state: it.

    Raises:
        ValueError: two names become one.
    """
    bare = {_without_wrappers(key): value for key, value in state.items()}
    for attribute in _ATTRIBUTES:
        if bare and all(key.startswith(attribute) for key in bare):
            bare = {_without_wrappers(k.removeprefix(attribute)): v for k, v in bare.items()}
    if len(bare) < len(state):
        raise ValueError(
            f"{name} holds a tensor twice, with and without a prefix such as {_WRAPPERS[0]!r}"
        )
    return bare


def _without_wrappers(key: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if key.startswith(w)), None):
        key = key.removeprefix(wrapper)
    return key.replace("._orig_mod.", ".")  # a part alone was compiled


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf_8_name(path) as name:
            return load_file(name)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint that can be loaded without running code"
        ) from error


def _read_torch(path: Path) -> Any:
    unknown: dict[str, str] = {}
    try:
        unknown |= _globals(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(unknown)):
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    # the unpickler raises almost anything on damaged bytes, and so do files that are told to seek
    except Exception as error:
        raise ValueError(_why_not(path, unknown, str(error))) from error


def _stand_ins(names: Iterable[str]) -> list[Any]:
    """What torch's unpickler shall take for the things of these names, unless it knows them."""
    made = [(type(name, (_Beside,), {"name": name}), name) for name in names if name != _DICT]
    return [*made, (_empty_dict, _DICT)]


def _empty_dict(*args: object) -> dict[Any, Any]:
    """For a defaultdict: the unpickler fills none but a plain one."""
    return {}


def _globals(path: Path) -> dict[str, str]:
    """The classes and functions that a file names, and the last word before each: often its key."""
    found: dict[str, str] = {}
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_OLD_PICKLES):
                _add_globals(found, file)
        return found
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                with archive.open(name) as file:
                    _add_globals(found, file)
    return found


def _add_globals(found: dict[str, str], file: IO[bytes]) -> None:
    word = ""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # torch's unpickler, as Python's, takes old names for their new ones
            module, name = NAME_MAPPING.get((module, name), (module, name))
            found.setdefault(f"{IMPORT_MAPPING.get(module, module)}.{name}", word)
        elif isinstance(argument, str):
            word = argument


def _why_not(path: Path, unknown: dict[str, str], error: str) -> str:
    """What is said of a file that does not load.

    Args:
        path: the file.
        unknown: from :func:`_globals`.
        error: what torch says of it.
    """
    holder = next((key for key in _HOLDERS[:-1] if key in unknown.values()), "")
    if "Unsupported operand" in error:
        return _needs_code(path, "", "pickle of a newer protocol than 2", holder)
    odd = [n for n in unknown if not (n.startswith(_HARMLESS) or n.endswith("Storage"))]
    if not odd:
        return f"{path} is damaged, or no checkpoint that can be loaded without running code"
    culprit = next((name for name in odd if name in error), odd[0])
    return _needs_code(path, unknown[culprit], culprit, holder)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds.

    Raises:
        ValueError: there is none.
    """
    key = ""
    while isinstance(content, dict):
        inner = next((k for k in _HOLDERS if isinstance(content.get(k), dict | _Beside)), None)
        if inner is None:
            break
        key, content = inner, content[inner]
    if isinstance(content, _Beside):
        raise ValueError(_needs_code(path, key, content.name, key))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, _Beside):
            raise ValueError(_needs_code(path, str(name), value.name, key))
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(f"{path} holds no state dict of plain tensors: see its entry {name!r}")
    return content


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers that are all in the file.

    A stride of 0 makes petabytes of one number, and shapes say how large a network to build.
    """
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _needs_code(path: Path, entry: str, kind: str, holder: str) -> str:
    """What is said of an entry that cannot be loaded, and how its owner converts the file."""
    where = f" as {entry[:40]!r}" if entry else ""
    if kind.startswith("numpy."):
        weights = "{k: t.as_tensor(v) for k, v in w.items()}"
    else:  # a whole network, where the weights should be
        weights = "w.state_dict()" if entry == holder else "w"
    return (
        f"{path} holds a {kind[:80]}{where}, which cannot be loaded without running code; if you"
        ' trust the file, convert it: python -c "import torch as t; w = t.load('
        f"{path.name!r}, 'cpu', weights_only=False){f'[{holder!r}]' if holder else ''};"
        f" t.save({weights}, 'weights.pth')\""
    )
