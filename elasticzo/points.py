"""The points at which a forward evaluates the network: the two passes of an estimate, or others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Points:
    """`w` itself where `base`, which comes first; then halves of the queries.

    Half `2q` is `w + eps s z_q`, half `2q + 1` is `w - eps s z_q`: here alone they are numbered.
    """

    halves: range
    base: bool = False

    def __len__(self) -> int:
        return len(self.halves) + self.base

    def one(self, place: int) -> Points:
        """The point at a place, alone."""
        if self.base and place == 0:
            return Points(range(0), base=True)
        half = self.halves[place - self.base]
        return Points(range(half, half + 1))

    def signed(self) -> Iterator[tuple[int, float]]:
        """(query, sign) of each half."""
        return ((half // 2, 1.0 - 2.0 * (half % 2)) for half in self.halves)

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """(start, stop) where the points are neighbouring halves alone, as kernels take them."""
        if self.base or not self.halves or (self.halves.step != 1 and len(self.halves) > 1):
            return None
        return self.halves[0], self.halves[-1] + 1


CLEAN = Points(range(0), base=True)


def two_sided(queries: int) -> Points:
    """Both sides of every query."""
    return Points(range(2 * queries))


def plus_sides(queries: int) -> Points:
    """`w`, and the + side of every query."""
    return Points(range(0, 2 * queries, 2), base=True)
