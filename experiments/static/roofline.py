"""Time that a kernel needs at the least on an H200: bytes moved, instructions executed.

Time is that of the busiest unit, none waiting for another: a floor, not a forecast. Programs are
spread evenly, so that the busiest multiprocessor runs `ceil(programs / multiprocessors)` of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WARP = 32


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do at the most; the defaults are those of an H200 SXM.

    Data-sheet values; a benchmark that has measured its own passes them in.
    """

    # NVIDIA H200 data sheet: 4.8 TB/s of HBM3e; 989 TFLOP/s of dense bf16, 494.7 of tf32 and 1,979
    # of int8 (half of the values printed, which are with sparsity).
    memory: float = 4.8e12  # bytes a second
    bf16: float = 989e12  # operations a second, two for a multiply-add
    tf32: float = 494.7e12
    int8: float = 1979e12
    # NVIDIA H100 architecture white paper: 132 multiprocessors (SXM), boost 1.98 GHz; four
    # schedulers in each, a warp instruction a clock each. 67 TFLOP/s of fp32 are
    # 132 x 128 lanes x 2 x 1.98 GHz: four warp instructions a clock, the limit of issue.
    multiprocessors: int = 132
    clock: float = 1.98e9
    issue: float = 4.0  # warp instructions a clock and multiprocessor
    # CUDA C++ Programming Guide, throughput of arithmetic instructions, compute capability 9.0:
    # lanes a clock and multiprocessor.
    integer: float = 64.0  # add, compare, minimum, shift, logic
    multiply: float = 64.0  # 32-bit integer multiply-add, a pipe of its own
    fp64: float = 64.0
    special: float = 16.0  # reciprocal, square root, base-2 exponential and logarithm


H200 = Peaks()

# Opcodes by the pipe of limited width that runs them; what is named nowhere is only issued.
PIPES = {
    "integer": [
        *("FMNMX", "FSEL", "FSETP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3"),
        *("PRMT", "SEL", "SHF", "SHL", "SHR", "VIADD", "VIADDMNMX", "VIMNMX"),
    ],
    "multiply": ["IMAD", "IMUL"],
    "fp64": ["DADD", "DFMA", "DMUL", "DSETP"],
    "special": ["MUFU"],
}


# Products of a warp by the first word of their shape, as sm_80 writes it: rows, columns, depth.
SHAPES = {"16832": (16, 8, 32), "16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
MFMA = {"i8": "int8", "bf16": "bf16", "xf32": "tf32", "f32": "fp32"}


def tensor_operations(opcode: str) -> tuple[str, float] | None:
    """Dtype and operations of one warp's product, or None; a wgmma serves four warps.

    Of sm_100's UTC*MMA the shape stands in a descriptor: None.
    """
    if match := re.match(r"v_mfma_[fi]32_(\d+)x(\d+)x(\d+)_?(\w+)", opcode):
        m, n, k = map(int, match.groups()[:3])
        return MFMA[match.group(4)], 2.0 * m * n * k
    if match := re.match(r"[HI]GMMA\.(\d+)x(\d+)x(\d+)\b", opcode):
        m, n, k = map(int, match.groups())
        count = 2 * m * n * k / 4
    elif match := re.match(r"[HI]MMA\.(\d+)\b", opcode):
        m, n, k = SHAPES[match.group(1)]
        count = 2.0 * m * n * k
    else:
        return None
    return ("int8" if opcode.startswith("I") else "tf32" if ".TF32" in opcode else "bf16"), count


def repeats(constants: Mapping[str, Any], warps: int, loop: Mapping[str, int]) -> float | None:
    """How often a program makes the products of its tile in a turn of the main loop.

    1, or 3 for the three of tf32x3; more where warps that are too many make the same ones. None
    where there are no products, or opcodes do not tell their size.
    """
    made = [n * product[1] for op, n in loop.items() if (product := tensor_operations(op))]
    if not made:
        return None
    tile = float(constants["BM"] * constants["BN"] * constants["BK"])
    return round(sum(made) * warps / ((4 if constants["PAIR"] else 2) * tile), 3)


def predict(
    problem: Mapping[str, int],
    warps: int,
    outside: Mapping[str, int],
    loop: Mapping[str, int],
    peaks: Peaks = H200,
) -> dict[str, Any]:
    """Microseconds that each unit is busy, and which binds.

    Args:
        problem: `bytes`, `programs`, and `turns` of the main loop (1).
        warps: of a program.
        outside, loop: opcodes that a warp executes once, and in each turn (`Program.executed`).
        peaks: of the GPU.
    """
    turns = problem.get("turns", 1)
    executed = {op: outside.get(op, 0) + turns * loop.get(op, 0) for op in {*outside, *loop}}
    # Warps that the busiest multiprocessor runs.
    busiest = -(-problem["programs"] // peaks.multiprocessors) * warps
    second = busiest / peaks.clock  # of a unit that serves a warp instruction a clock
    times = {
        "memory": problem["bytes"] / peaks.memory,
        "issue": sum(executed.values()) * second / peaks.issue,
        "tensor": 0.0,
    }
    rates = asdict(peaks)
    for pipe, opcodes in PIPES.items():
        times[pipe] = sum(executed.get(op, 0) for op in opcodes) * second * WARP / rates[pipe]
    for opcode, count in executed.items():
        if product := tensor_operations(opcode):
            dtype, operations = product
            own = rates[dtype] / peaks.multiprocessors
            times["tensor"] += count * busiest * operations / own
    bound = max(times, key=lambda unit: times[unit])
    return {
        "us": round(times[bound] * 1e6, 2),
        "bound": bound,
        **{f"{unit}_us": round(time * 1e6, 2) for unit, time in times.items()},
    }


__all__ = ["H200", "Peaks", "predict", "repeats", "tensor_operations"]
