"""One specialisation of a kernel, as a launch makes it: what `triton.compile` needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton.language as tl

TYPES = {
    "fp32": tl.float32,
    "fp64": tl.float64,
    "bf16": tl.bfloat16,
    "int8": tl.int8,
    "int32": tl.int32,
}


@dataclass(frozen=True)
class Config:
    """One specialisation of a kernel.

    Attributes:
        name: `<op>-<noise>-<dtype>-...`, unique within a target.
        kernel: the `@jit` function.
        signature: Triton type of every argument that is no constexpr ("*fp32", "i32", "fp64", ...).
        constants: value of every constexpr argument.
        aligned: arguments known to be multiples of 16, pointers included.
        warps, stages: of the launch.
        problem: sizes of the problem for which bytes moved and time are predicted; empty for no
            prediction. `bytes` (to and from memory at the least) and `programs` (launched) are
            needed; `turns` of a program's main loop (1), `noise` (elements of z that a program
            makes in a turn, or in all where it has no loop) and `flops` (of products; given for
            every kernel that multiplies matrices) where they apply. Other keys only describe.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int = 3
    problem: dict[str, int] = field(default_factory=dict)

    @property
    def plain_constants(self) -> dict[str, Any]:
        """The constants as JSON has them: types by name."""
        return {
            k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in self.constants.items()
        }


__all__ = ["TYPES", "Config"]
