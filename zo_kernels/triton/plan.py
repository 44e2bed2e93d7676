"""How the kernels of `zo_kernels.paired_batch_norm` walk a batch: from its shape and strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zo_kernels.layout import channels_last
from zo_kernels.triton.norms import alignment, power_of_two

INT32_MAX = 2**31 - 1
# Not yet measured on a GPU: 16 elements a thread at 4 warps; programs enough for 132 processors.
TILE = 2048
MAX_CHANNELS = 64  # channels innermost: 128 bytes of bf16
MAX_ROWS = 1024
PROGRAMS = 1024  # wanted of the first kernel, which splits the rows of a channel to get there
MAX_SPLITS = 256
TILES_PER_SPLIT = 4


class Plan(NamedTuple):
    """How the kernels walk a half of x, from its shape and strides alone."""

    outer: int
    rows: int
    channels: int
    last: bool  # channels run innermost
    tile_rows: int
    tile_channels: int
    splits: int
    per_split: int  # tiles

    def wider(self) -> Plan:
        """With tiles twice as large, for a kernel that keeps nothing but x.

        Odd extents need an address an element: with more of them registers run out.
        """
        if self.align == 1:
            return self
        if self.last:
            return self._replace(tile_rows=min(2 * self.tile_rows, power_of_two(self.rows)))
        channels = min(2 * self.tile_channels, power_of_two(self.channels))
        return self._replace(tile_channels=channels)

    @property
    def align(self) -> int:
        return alignment(self.channels if self.last else self.rows)

    @property
    def blocks(self) -> tuple[int, int]:
        """Of rows in a slab, of channels."""
        return -(-self.rows // self.tile_rows), -(-self.channels // self.tile_channels)

    @property
    def extents(self) -> tuple[int, int, int]:
        """Outer, rows and channels, as kernels take them: the innermost in units of `align`."""
        if self.last:
            return self.outer, self.rows, self.channels // self.align
        return self.outer, self.rows // self.align, self.channels

    @property
    def constants(self) -> dict[str, int]:
        return {"LAST": self.last, "ALIGN": self.align, "ROWS": self.tile_rows}

    @property
    def wide(self) -> bool:
        """Whether an offset within a tile can exceed 32 bits; those of tiles always have 64."""
        if self.last:
            return self.tile_rows * self.channels + self.tile_channels > INT32_MAX
        return self.tile_channels * self.rows + self.tile_rows > INT32_MAX


def plan_of(x: Tensor, halves: int) -> Plan:
    """`x` is not empty, and contiguous in one of both formats."""
    channels, batch = x.shape[1], x.shape[0] // halves
    spatial = x.numel() // (x.shape[0] * channels)
    last = channels_last(x) and channels > 1
    outer = 1 if last or channels == 1 else batch
    rows = batch * spatial // outer
    if last:
        tile_channels = min(power_of_two(channels), MAX_CHANNELS)
        tile_rows = min(TILE // tile_channels, power_of_two(rows))
    else:  # the tile that wastes the fewest rows, then the longest
        sizes = [n for n in (128, 256, 512, MAX_ROWS) if n <= rows] or [power_of_two(rows)]
        tile_rows = min(sizes, key=lambda n: (-(-rows // n) * n, -n))
        tile_channels = min(power_of_two(channels), TILE // tile_rows)
    blocks_r, blocks_c = -(-rows // tile_rows), -(-channels // tile_channels)
    tiles = blocks_r * outer
    wanted = min(-(-PROGRAMS // (halves * blocks_c)), -(-tiles // TILES_PER_SPLIT), MAX_SPLITS)
    per_split = -(-tiles // wanted)
    splits = -(-tiles // per_split)
    return Plan(outer, rows, channels, last, tile_rows, tile_channels, splits, per_split)
