"""Which formulation and which tile a problem gets: tuning table first, then the default.

A table is written by :mod:`tritonbnn.kernels.autotune`: the user's own in the cache folder, or
``configs/<gpu>.json``, which is reviewed. A lookup takes the exact key, else the nearest batch
bucket, else the default; an unknown GPU has no table and gets defaults. A reviewed table that
cannot be trusted is an error that names file and entry. The user's own is left out then, with a
line.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import torch

from tritonbnn.bits import WORD_BITS, words
from tritonbnn.cli import UserError
from tritonbnn.compiled.build import cache_folder
from tritonbnn.kernels.targets import ANY, Target, target_of

CONFIG_DIR = Path(__file__).parent / "configs"
ONE_BIT = ("mma", "wgmma")
"""Formulations on the one-bit tensor core: what a compiler makes of them is its version's."""

BELOW_TRITON = (*ONE_BIT, "warpgroup")
"""Formulations in a language below Triton's, which a GPU may have and not be trusted with."""

logger = logging.getLogger(__name__)

FORMULATIONS = {
    "unit_plan": ("keep", "recompute", "fused"),
    "conv_packed": ("int8", "popcount", "mma", "wgmma"),
    "conv_real": ("dot", "library", "warpgroup"),
    "conv_input_grad": ("dot", "library", "warpgroup"),
    "conv_weight_grad": ("dot", "library", "warpgroup"),
}
"""Of the operations that have several, the default first. All others are computed directly."""


def known_formulations(op: str) -> tuple[str, ...]:
    """All of an operation, the default first."""
    return FORMULATIONS.get(op, ("direct",))


def operations() -> tuple[str, ...]:
    """All that a table may tune: every launcher, and a unit's plan."""
    from tritonbnn import kernels  # which imports this module

    return tuple(dict.fromkeys((*kernels.__all__, *FORMULATIONS)))


@dataclass(frozen=True, order=True)
class TileConfig:
    """How a kernel cuts its problem: a tile of M x N outputs, K at a time.

    Elementwise kernels read ``block_m`` as rows and ``block_n`` as channels.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, order=True)
class Choice:
    """What a problem runs as."""

    formulation: str
    tile: TileConfig


@dataclass(frozen=True, order=True)
class ProblemKey:
    """A problem as the tuning table knows it. Elementwise problems have ``out_channels`` 0."""

    op: str
    dtype: str
    batch: int
    height: int
    width: int
    channels: int
    out_channels: int = 0
    kernel_size: int = 1
    stride: int = 1

    def bucketed(self) -> "ProblemKey":
        """The key with its batch rounded up to a power of two, so a new batch tunes nothing."""
        return replace(self, batch=power_of_two(self.batch))

    def distance(self, other: "ProblemKey") -> float:
        """How many batch doublings lie between two keys; infinite if they differ otherwise."""
        if replace(self, batch=other.batch) != other:
            return math.inf
        return abs(math.log2(self.batch / other.batch))


Table = dict[ProblemKey, Choice]


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover ``size``; triton.cdiv, which a host waits microseconds for."""
    return -(-size // block)


def whole_words(tile: TileConfig) -> TileConfig:
    """An elementwise tile of whole packed words, as large as before: fewer rows for more channels.

    With all its rows, a narrow tile would become up to 32 times as large, which no GPU has
    registers for.
    """
    block_n = max(tile.block_n, WORD_BITS)
    return replace(tile, block_m=max(1, tile.block_m * tile.block_n // block_n), block_n=block_n)


def elementwise_key(op: str, x: torch.Tensor, *others: torch.Tensor) -> ProblemKey:
    """The key of an elementwise problem over (N, C, H, W) or (M, C).

    Args:
        op: the operation.
        x: gives the shape.
        others: operands whose dtype may be another one; "int16+bfloat16" names both.
    """
    return _elementwise_key(op, x.shape, x.dtype, *(tensor.dtype for tensor in others))


@lru_cache(maxsize=4096)
def _elementwise_key(op: str, shape: torch.Size, *dtypes: torch.dtype) -> ProblemKey:
    batch, channels, *pixels = shape
    height, width = pixels or (1, 1)
    return ProblemKey(op, joint_dtype_name(*dtypes), batch, height, width, channels)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def joint_dtype_name(*dtypes: torch.dtype) -> str:
    """The distinct dtypes by name, in order: ``int16+bfloat16``."""
    return "+".join(dict.fromkeys(dtype_name(dtype) for dtype in dtypes))


def choose(key: ProblemKey, device: torch.device) -> Choice:
    """The formulation and tile for a problem on a device.

    Raises:
        UserError: the GPU is too old for the kernels, or has no such arithmetic.
    """
    if _forced is not None:
        return _forced(key)
    return _choose(key, device)


@lru_cache(maxsize=4096)
def _choose(key: ProblemKey, device: torch.device) -> Choice:
    target = target_of(device)
    if "bfloat16" in key.dtype and not target.bfloat16:
        raise UserError(
            f"a GPU of {target.name} ({target.models}) has no bfloat16 arithmetic: use float16"
            " (--precision fp16)"
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return look_up(key, {} if gpu is None else table_of(gpu), target)


_forced: Callable[[ProblemKey], Choice] | None = None
_stand_in: Target | None = None


@contextmanager
def using(forced: Choice | Table | Target, target: Target = ANY) -> Iterator[None]:
    """Make every launcher in the block take one choice, or look it up in ``forced`` alone.

    For a target it is the target's default, whatever the tensors are on. What a table does not
    have is the default of the ``target`` that is given beside it.
    """
    global _forced, _stand_in
    previous = _forced, _stand_in

    @cache
    def chosen(key: ProblemKey) -> Choice:
        if isinstance(forced, Choice):
            return forced
        if isinstance(forced, Target):
            return default(key.bucketed(), target=forced)
        return look_up(key, forced, target)

    stand_in = forced if isinstance(forced, Target) else target
    _forced, _stand_in = chosen, None if stand_in is ANY else stand_in
    try:
        yield
    finally:
        _forced, _stand_in = previous


def choose_default(key: ProblemKey, formulation: str, device: torch.device) -> Choice:
    """A formulation's default on a device, for what its table's choice cannot do."""
    return default(key.bucketed(), formulation, _stand_in or target_of(device))


def look_up(key: ProblemKey, table: Table, target: Target = ANY) -> Choice:
    """The exact entry, else that of the nearest batch bucket, else the target's default."""
    key = key.bucketed()
    if key in table:
        return table[key]
    nearest = min(table, key=key.distance, default=None)
    if nearest is None or math.isinf(key.distance(nearest)):
        return default(key, target=target)
    return table[nearest]


def formulations(op: str, target: Target) -> tuple[str, ...]:
    """Those of an operation that exist on a target, the default first."""
    if op == "conv_packed":
        return target.products
    known = known_formulations(op)
    if op == "unit_plan" and target.products[0] == "mma":  # convolving again costs no memory
        return tuple(sorted(known, key="fused".__ne__))
    if "library" in known and not target.matrices:
        return ("library",)
    if op == "conv_input_grad":
        return target.input_grads
    if op == "conv_real":
        return target.reals
    return target.weight_grads if op == "conv_weight_grad" else known


def default(key: ProblemKey, formulation: str | None = None, target: Target = ANY) -> Choice:
    """What an untuned problem runs as: the first formulation, and a tile clipped to the problem.

    The first, that is, which takes the problem and does not waste half of a tile.
    """
    if formulation is None:
        names = (name for name in formulations(key.op, target) if takes(name, key))
        # At 32 channels half of a warpgroup's 64 rows are empty. The bytes of the weight's gradient
        # hide one tap of them, not nine. With a real weight, rows are pixels.
        plain = key.op == "conv_weight_grad" and key.kernel_size == 1
        wide = key.channels > 32 or plain or key.op == "conv_real"
        formulation = next(name for name in names if name != "warpgroup" or wide)
    tile = default_tile(key, formulation)
    if formulation == "dot" and "warpgroup" in target.weight_grads:
        tile = _for_warpgroups(key, tile)
    return Choice(formulation, fitted(tile, target) if key.out_channels else tile)


def _for_warpgroups(key: ProblemKey, tile: TileConfig) -> TileConfig:
    """A product's tile where warpgroups multiply: a wider one asks the second cache for less.

    It pays where K is long (``benchmarks.count``), for a multiprocessor has one block of it then.
    """
    long = key.op == "conv_input_grad" and (key.kernel_size, key.stride) == (3, 1)
    if not long or key.channels < 256 or key.dtype == "float32":
        return tile
    return replace(tile, block_n=256)


def takes(formulation: str, key: ProblemKey) -> bool:
    """Whether a formulation has a kernel for a problem.

    The warpgroup's packed product is a plain one; its others have 16 bits, and are copied by 8.
    """
    if formulation == "wgmma":
        return (key.kernel_size, key.stride) == (1, 1)
    if formulation != "warpgroup":
        return True
    if key.dtype == "float32" or key.out_channels % 8:
        return False
    if key.op == "conv_input_grad":
        return key.channels % 8 == 0 and (key.stride == 1 or key.kernel_size == 3)
    if key.op == "conv_real":  # places in a packed image are int32
        return key.batch * key.height * key.width * words(key.channels) < 2**31
    return True


def on_common_cores(key: ProblemKey, target: Target) -> Choice:
    """The default without what is below Triton."""
    names = (name for name in formulations(key.op, target) if name not in BELOW_TRITON)
    return default(key, next(names), target)


def fitted(tile: TileConfig, target: Target) -> TileConfig:
    """A product's tile within the target's registers: fewer loads ahead, and fewer outputs."""
    tile = replace(tile, num_stages=min(tile.num_stages, target.most_stages))
    if not target.narrow or tile.block_n <= 32:
        return tile
    block_m, block_n = max(16, tile.block_m // 2), min(64, tile.block_n)
    return replace(tile, block_m=block_m, block_n=block_n, num_warps=8)


def default_tile(key: ProblemKey, formulation: str) -> TileConfig:
    """A tile that fits every problem of the operation, clipped to this one."""
    if key.out_channels == 0:
        if key.op == "unit_activation_backward":
            # Four accumulators. A thread has eight channels, so that their bits are a byte of its
            # own; with 128 channels side by side the compiler takes another layout for them.
            block_n = min(64, power_of_two(key.channels))
            return TileConfig(1024 // block_n, block_n, 1, 4, 1)
        # Registers: float32 takes two where bf16 takes one, a backward pass has accumulators.
        elements = 2048 if "float32" in key.dtype or key.op.endswith("backward") else 4096
        block_n = min(128, power_of_two(key.channels))
        # With half the threads, the compiler spills a value or two of some shapes on sm_90.
        num_warps = 8 if key.op.startswith("unit") else 4
        return TileConfig(elements // block_n, block_n, 1, num_warps, 1)
    if formulation == "mma":
        return TileConfig(128, min(64, max(16, power_of_two(key.out_channels))), 1, 4, 1)
    if formulation == "wgmma":
        columns = min(256, max(32, power_of_two(key.out_channels)))
        return TileConfig(128, columns, 512 if key.channels <= 512 else 1024, 8, 3)
    if formulation == "warpgroup" and key.op == "conv_input_grad":
        channels = 128 if key.channels > 64 else 64
        # where images move and little is multiplied, registers are better than pixels
        short = key.kernel_size == 1 and key.out_channels < 256
        return TileConfig((64 if short else 128) * 128 // channels, channels, 64, 4, 4)
    if formulation == "warpgroup" and key.op == "conv_real":
        outputs = min(128, max(32, power_of_two(key.out_channels)))
        warps = 8 if outputs == 128 else 4
        return TileConfig(16 * warps, outputs, 64 if key.channels > 32 else 32, warps, 4)
    if formulation == "warpgroup":
        channels = 128 if key.channels > 64 else 64
        outputs = min(256, max(64, power_of_two(key.out_channels)))
        return TileConfig(outputs, channels, 64, channels // 16, 4)
    if formulation == "popcount":
        return TileConfig(64, min(64, power_of_two(key.out_channels)), 32, 8, 2)
    inner, columns = key.channels, key.out_channels
    if key.op == "conv_input_grad":
        inner, columns = columns, inner
    if key.op == "conv_weight_grad":
        block_m = min(128, max(16, power_of_two(key.out_channels)))
        block_n, block_k = min(128, max(32, power_of_two(key.channels))), 64
    else:
        block_m, block_n = 128, min(128, max(16, power_of_two(columns)))
        if key.op == "conv_input_grad" and key.out_channels == 2 * key.channels:
            block_n = min(block_n, 64)  # what comes through the shortcut takes registers twice
        block_k = min(64, max(32, power_of_two(inner)))
    if key.dtype == "float32":  # no tensor core: registers, not shared memory, bound the tile
        return TileConfig(min(block_m, 64), min(block_n, 64), 32, 8, 3)
    num_warps = 8 if block_m * block_n > 64 * 128 else 4
    return TileConfig(block_m, block_n, block_k, num_warps, 3 if block_n > 32 else 2)


def table_path(gpu: str) -> Path:
    """Where the reviewed table of a GPU model lives."""
    return CONFIG_DIR / _file_name(gpu)


def own_path(gpu: str) -> Path:
    """Where the user's table of a GPU model lives.

    Raises:
        OSError: the user has no home, and no other folder is named.
    """
    return cache_folder() / "tables" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


@lru_cache
def table_of(gpu: str) -> Table:
    """What is tuned for a GPU model: the user's own entries over the reviewed ones."""
    path = table_path(gpu)
    found = _of_this_triton(path, gpu) if path.exists() else {}
    try:
        path = own_path(gpu)
        return found | (_of_this_triton(path, gpu) if path.exists() else {})
    except (OSError, ValueError) as error:
        logger.warning("%s: that table is not used; remove it, or tune again", error)
        return found


def _of_this_triton(path: Path, gpu: str) -> Table:
    """A table without what another Triton's one-bit kernels were tuned to."""
    table = read_table(path, gpu)
    triton = json.loads(path.read_text(encoding="utf-8")).get("triton")
    if triton in (None, version("triton")):
        return table
    kept = {key: choice for key, choice in table.items() if choice.formulation not in ONE_BIT}
    if len(kept) < len(table):
        logger.warning(
            "%s is of Triton %s: its entries of %s are left out", path, triton, ", ".join(ONE_BIT)
        )
    return kept


def read_table(path: Path, gpu: str) -> Table:
    """Read and check a tuning table; ValueError names the file and the entry at fault."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise ValueError(f"{path}: a tuning table is an object with a list of entries")
    if document.get("gpu") != gpu:
        raise ValueError(f"{path}: tuned for {document.get('gpu')!r}, not for {gpu!r}")
    table: Table = {}
    for index, entry in enumerate(document["entries"]):
        try:
            key, choice = parse_entry(entry)
            if key in table:
                raise ValueError(f"repeats the key {asdict(key)}")
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        table[key] = choice
    return table


def parse_entry(entry: Any) -> tuple[ProblemKey, Choice]:
    """Key and choice of one entry of a table, every value checked."""
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object, not {entry!r}")
    missing = {"key", "formulation", "tile"} - set(entry)
    if missing:
        raise KeyError(f"misses {', '.join(sorted(missing))}")
    key = _from_fields(ProblemKey, entry["key"])
    tile = _from_fields(TileConfig, entry["tile"])
    if key.op not in (ops := operations()):
        raise ValueError(f"unknown op {key.op!r}; expected one of {', '.join(ops)}")
    known = known_formulations(key.op)
    if entry["formulation"] not in known:
        expected = " or ".join(known)
        raise ValueError(f"{key.op} runs as {expected}, not as {entry['formulation']!r}")
    for name, value in asdict(tile).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        if name != "num_stages" and value != power_of_two(value):
            raise ValueError(f"{name} must be a power of two, not {value}")
    if key != key.bucketed():
        raise ValueError(f"batch must be a power of two, not {key.batch}")
    return key, Choice(entry["formulation"], tile)


def _from_fields(cls: type, values: Any) -> Any:
    """Build a dataclass from a JSON object that has exactly its fields, each of its type."""
    expected = get_type_hints(cls)
    if not isinstance(values, dict) or set(values) != set(expected):
        raise ValueError(f"expected the fields {', '.join(expected)}, not {values!r}")
    for name, kind in expected.items():
        if type(values[name]) is not kind:
            raise TypeError(f"{name} must be {kind.__name__}, not {values[name]!r}")
    return cls(**values)
