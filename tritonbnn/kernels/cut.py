"""How the one-bit tensor core's kernels cut a block and the sum over K."""

from dataclasses import dataclass
from functools import lru_cache

from tritonbnn.kernels.config import TileConfig

CHUNK_WORDS = 16
"""Words of K in a step of the kernel's loop, two instructions of 256 bits."""


@dataclass(frozen=True)
class Cut:
    """How a block's warps share it, in tiles of 16 channels by 8 pixels: a kernel's constant."""

    warps_o: int
    tiles_o: int
    warps_p: int
    tiles_p: int


@lru_cache
def block_tiles(tile: TileConfig) -> Cut:
    """How warps share a block: channels first, at most 64 a warp, then pixels.

    A count is 0 where the block is too small for its warps.
    """
    tiles_o = min(4, tile.block_n // 16)
    warps_o = tile.block_n // (16 * tiles_o)
    warps_p = tile.num_warps // warps_o
    tiles_p = tile.block_m // (8 * warps_p) if warps_p else 0
    return Cut(warps_o, tiles_o, warps_p, tiles_p)
