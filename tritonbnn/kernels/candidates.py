"""The tiles worth trying for a problem."""

from collections.abc import Iterator
from dataclasses import astuple
from itertools import groupby, product

from tritonbnn.kernels import config
from tritonbnn.kernels.config import Choice, ProblemKey, TileConfig, power_of_two
from tritonbnn.kernels.cut import block_tiles
from tritonbnn.kernels.targets import Target

MAX_ACCUMULATORS = 128
"""Accumulators per thread: beyond, registers run out before the operands have any."""

_OPERAND_BYTES = {"int32": 1, "bfloat16": 2, "float16": 2, "float32": 4}


def candidates(key: ProblemKey, target: Target) -> list[Choice]:
    """All choices worth compiling, the default first, each once.

    Args:
        key: the problem.
        target: the GPU's, which bounds shared memory and says what exists there.
    """
    found = [config.default(key, target=target)]
    for formulation in config.formulations(key.op, target):
        for tile in _tiles(key, formulation):
            tile = tile if key.op == "unit_plan" else clipped(key, tile)
            if fits(key, formulation, tile, target):
                found.append(Choice(formulation, tile))
    return list(dict.fromkeys(found))


def spread(choices: list[Choice], limit: int | None) -> list[Choice]:
    """At most ``limit`` of the choices: the first, and an equal share of every formulation's.

    A share is taken at equal distances, for neighbours in the list are alike. What a formulation
    has too few choices for goes to the others.
    """
    if limit is None:
        return choices
    first, *rest = choices
    groups = [list(group) for _, group in groupby(rest, key=lambda choice: choice.formulation)]
    taken, left = {first}, limit - 1
    for behind, group in enumerate(sorted(groups, key=len)):
        share = min(len(group), left // (len(groups) - behind))
        # from the middle of each of so many equal parts
        taken |= {group[(2 * i + 1) * len(group) // (2 * share)] for i in range(share)}
        left -= share
    return [choice for choice in choices if choice in taken]


def _tiles(key: ProblemKey, formulation: str) -> Iterator[TileConfig]:
    if formulation == "library" or key.op == "unit_plan":
        yield config.default_tile(key, formulation)
    elif key.out_channels == 0:
        for elements, width, warps in product((1024, 2048, 4096, 8192), (32, 64, 128, 256), (4, 8)):
            yield TileConfig(elements // width, width, 1, warps, 1)
    elif formulation == "mma":
        for m, n, warps in product((64, 128, 256, 512), (16, 32, 64, 128), (4, 8)):
            yield TileConfig(m, n, 1, warps, 1)
    elif formulation == "wgmma":
        for warps, n, k, stages in product((4, 8, 16), (64, 128, 256), (512, 1024, 2048), (3, 4)):
            yield TileConfig(16 * warps, n, k, warps, stages)
    elif formulation == "warpgroup" and key.op == "conv_input_grad":
        for m, n, stages in product((32, 64, 128, 256), (64, 128), (3, 4, 6)):
            yield TileConfig(m, n, 64, 4, stages)
    elif formulation == "warpgroup" and key.op == "conv_real":
        for warps, n, k, stages in product((4, 8), (32, 64, 128), (32, 64), (3, 4)):
            yield TileConfig(16 * warps, n, k, warps, stages)
    elif formulation == "warpgroup":
        for m, n, k, stages in product((64, 128, 256), (64, 128), (64, 128), (3, 4)):
            yield TileConfig(m, n, k, n // 16, stages)
    elif formulation == "popcount":
        for m, n, warps in product((32, 64, 128), (32, 64), (4, 8)):
            yield TileConfig(m, n, 32, warps, 2)
    else:
        blocks = product((64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
        for m, n, k, warps, stages in blocks:
            yield TileConfig(m, n, k, warps, stages)


def clipped(key: ProblemKey, tile: TileConfig) -> TileConfig:
    """The tile without what lies beyond the problem; different tiles may become one."""
    rows, columns, inner = _extent(key)
    least = 1 if key.out_channels == 0 else 16
    return TileConfig(
        min(tile.block_m, max(least, power_of_two(rows))),
        min(
            tile.block_n, max(least if key.op != "conv_weight_grad" else 32, power_of_two(columns))
        ),
        min(tile.block_k, max(32, power_of_two(inner))) if key.out_channels else 1,
        tile.num_warps,
        tile.num_stages,
    )


def _extent(key: ProblemKey) -> tuple[int, int, int]:
    """How far a problem extends in M, N and K; taps are not part of a tile."""
    pixels = key.batch * key.height * key.width
    if key.out_channels == 0:
        return pixels, key.channels, 1
    if key.op == "conv_weight_grad":
        return key.out_channels, key.channels, pixels
    if key.op == "conv_input_grad":
        return pixels, key.channels, key.out_channels
    return pixels, key.out_channels, key.channels


def fits(key: ProblemKey, formulation: str, tile: TileConfig, target: Target) -> bool:
    """Whether a tile stays within registers and shared memory by count; compiling tells exactly."""
    threads = target.warp_size * tile.num_warps
    elements = tile.block_m * tile.block_n
    if elements < threads:
        return False
    if key.out_channels == 0 or formulation == "library" or key.op == "unit_plan":
        return True
    if formulation == "mma":  # it keeps its operands in registers
        return elements <= MAX_ACCUMULATORS * threads and min(astuple(block_tiles(tile))) > 0
    if not config.takes(formulation, key):
        return False
    if formulation == "wgmma":
        return _fits_warpgroup(key, tile, target)
    if formulation == "warpgroup":
        whole, copied = _of_warpgroups(key.op, tile)
        fitting = copied * _OPERAND_BYTES[key.dtype] * tile.num_stages <= target.shared_bytes
        return whole and fitting and elements <= MAX_ACCUMULATORS * threads
    operands = (tile.block_m + tile.block_n) * tile.block_k * _OPERAND_BYTES[key.dtype]
    return (
        elements <= MAX_ACCUMULATORS * threads and operands * tile.num_stages <= target.shared_bytes
    )


def _of_warpgroups(op: str, tile: TileConfig) -> tuple[bool, int]:
    """Whether a tile is of whole instructions, and the numbers of a stage in shared memory.

    The other operand lies in registers.
    """
    if op == "conv_input_grad":
        return tile.block_n % 64 == 0 and tile.block_k == 64, tile.block_m * tile.block_k
    if op == "conv_real":
        whole = tile.block_m == 16 * tile.num_warps and min(tile.block_n, tile.block_k) >= 32
        return whole, tile.block_n * tile.block_k
    whole = tile.block_n == 16 * tile.num_warps and min(tile.block_m, tile.block_k) >= 64
    return whole, tile.block_m * tile.block_k


def _fits_warpgroup(key: ProblemKey, tile: TileConfig, target: Target) -> bool:
    """Whether a tile of the warpgroup's tensor core fits, and is whole after clipping.

    A thread has the accumulators, this stage's words of x and the next's; shared memory the weight.
    """
    registers = tile.block_n // 2 + 2 * tile.block_k // 64 + 32
    return (
        tile.block_m == 16 * tile.num_warps
        and tile.block_n >= max(32, tile.block_k // 32)  # a sum for every word of a stage
        and tile.block_k >= 512
        and registers <= min(255, 2**16 // (32 * tile.num_warps))
        and tile.block_n * tile.block_k // 8 * tile.num_stages <= target.shared_bytes
    )
