"""What must hold of every row, whatever the version of the compiler, and where it does not.

No spills, no local memory, shared memory within the GPU's limit (8 KiB where nothing is
multiplied), tensor cores where intended, 16-byte accesses where alignment allows, no float64
arithmetic in kernels of other types, no floats in integer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zo_kernels.rules import RULES

KIB = 1024
SHARED = {
    "cuda-80": 163 * KIB,
    "cuda-90": 227 * KIB,
    "cuda-100": 227 * KIB,
    "hip-gfx942": 64 * KIB,
}

_SCALARS = "scalars move to lanes of vector registers, not to memory"
_REPEATED = "fewer tiles of an instruction than warps, some of which make the same products"
_FEW_REGISTERS = "the compiler keeps to 96 registers, for a fifth program on a multiprocessor"
_RAGGED = "sizes that are no multiples of 16 are read element by element"
# What is known to break a limit: the value there (Triton 3.9), and why. A test fails when the table
# has another value, also a better one.
KNOWN: dict[str, tuple[dict[str, int], str]] = {
    "hip-gfx942/paired_linear-normal-mixed-16-shared": ({"scalar_spills": 6}, _SCALARS),
    "hip-gfx942/paired_linear-normal-mixed-16-ragged": ({"scalar_spills": 14}, _SCALARS),
    "hip-gfx942/paired_linear-normal-bf16-128-ragged": ({"scalar_spills": 22}, _SCALARS),
    "hip-gfx942/paired_conv2d-normal-mixed-128x16-gathered-pool": ({"scalar_spills": 2}, _SCALARS),
    "hip-gfx942/paired_conv2d-normal-mixed-128x32-gathered-pool": ({"scalar_spills": 3}, _SCALARS),
    "cuda-80/paired_linear-normal-bf16-128-ragged": ({"spills": 19, "local": 40}, _RAGGED),
    "cuda-90/paired_linear-normal-bf16-64-ragged": ({"spills": 4, "local": 8}, _RAGGED),
    "cuda-90/paired_linear-rademacher-tf32-16-ragged": ({"spills": 2, "local": 8}, _RAGGED),
    "cuda-90/stage-normal-fp32-bf16-general-pending-momentum": (
        {"spills": 2, "local": 8},
        _FEW_REGISTERS,
    ),
    "cuda-80/int8_paired_linear-64-ragged": ({"repeats": 2}, _REPEATED),
}
_ON_GFX942 = {
    2: (
        *("paired_linear-64-ragged", "matmul-nn-64-ragged", "matmul-tn-64-ragged"),
        *("paired_conv2d-64x32-lines", "paired_conv2d-64x32-gathered-pool"),
    ),
    4: (
        *("paired_linear-16", "paired_linear-16-odd", "paired_linear-16-ragged", "matmul-nn-16"),
        *("matmul-nn-16-ragged", "matmul-tn-16", "matmul-tn-16-ragged"),
        *("paired_conv2d-128x32-gathered-pool", "paired_conv1d-128x32-gathered"),
    ),
}
KNOWN |= {
    f"hip-gfx942/int8_{name}": ({"repeats": times}, _REPEATED)
    for times, names in _ON_GFX942.items()
    for name in names
}


# 16-byte (loads, stores) at the least, of the first pattern that a name begins with.
_LINEAR = r"(paired_linear|int8_paired_linear|int8_matmul)-(?!.*ragged)"
_NOT_BF16 = "(?!.*bf16)"  # gfx942: 256 threads to a block of 1024, 8 bytes a thread
WIDE: dict[str, dict[str, tuple[int, int]]] = {
    "cuda": {
        "perturbed_weights-.*-flat": (1, 2),
        "stage-.*-flat.*-pending-adam": (3, 5),
        "stage-.*-flat.*-pending": (1, 3),
        "stage-.*-flat": (1, 2),
        "update-.*-adam": (3, 3),
        "update-.*-momentum": (2, 2),
        "update-": (1, 1),
        "sample-(?!sparse)": (0, 1),
        "int8_range": (4, 0),
        "int8_requantize-.*-flat": (4, 1),
        "int8_perturbed_weights-flat": (1, 2),
        "int8_update-(?!.*int64)": (1, 1),  # 64-bit offsets: twice the threads, 8 bytes each
        "int8_paired_conv2d-.*-lines(?!.*(shared|single))": (4, 0),
        _LINEAR: (4, 0),
    },
    "hip": {
        f"perturbed_weights-{_NOT_BF16}.*-flat": (1, 2),
        f"stage-{_NOT_BF16}.*-flat.*-pending-adam": (3, 5),
        f"stage-{_NOT_BF16}.*-flat.*-pending": (1, 3),
        f"stage-{_NOT_BF16}.*-flat": (1, 2),
        f"update-{_NOT_BF16}.*-adam": (3, 3),
        f"update-{_NOT_BF16}.*-momentum": (2, 2),
        f"update-{_NOT_BF16}": (1, 1),
        "sample-(?!sparse)": (0, 1),
        "int8_range": (2, 0),
        "int8_requantize-.*-flat": (2, 0),
        _LINEAR: (2, 0),
    },
}


def key(row: Mapping[str, Any]) -> str:
    return f"{row['target']}/{row['name']}"


def violations(row: Mapping[str, Any]) -> list[str]:
    """What a row breaks beyond what is known, in words."""
    rules = (_size, _limits, _tensor_cores, _repeats, _wide_accesses, _floats)
    return [f"{key(row)}: {found}" for rule in rules for found in rule(row)]


def _size(row: Mapping[str, Any]) -> Iterator[str]:
    end = "EXIT" if row["target"].startswith("cuda") else "s_endpgm"
    if row["bytes"] <= 1000 or not row["opcodes"].get(end):
        yield f"no machine code in {row['bytes']} bytes"


def _limits(row: Mapping[str, Any]) -> Iterator[str]:
    shared = SHARED[row["target"]] if "flops" in row["problem"] else 8 * KIB
    limits = {"spills": 0, "scalar_spills": 0, "local": 0, "shared": shared}
    limits |= KNOWN.get(key(row), ({}, ""))[0]
    for name, limit in limits.items():
        if row.get(name, 0) > limit:
            yield f"{name} is {row[name]}, at most {limit}"


def _is_integer(row: Mapping[str, Any]) -> bool:
    name: str = row["name"]
    return name.startswith(("int8_", "integer_"))


def _tensor_cores(row: Mapping[str, Any]) -> Iterator[str]:
    """wgmma (sm_90) and tcgen05 (sm_100) from 64 rows on; ieee fp32 has none on NVIDIA."""
    if "flops" not in row["problem"]:
        return
    constants, found = row["constants"], row["tensor"]
    dtype = "bf16" if constants.get("DOT") == "bf16" else "tf32"
    dtype = "int8" if _is_integer(row) else dtype
    ieee = dtype == "tf32" and constants.get("PRECISION") == "ieee"
    if row["target"] == "hip-gfx942":
        suffix = {"int8": "_i8", "bf16": "_bf16"}.get(dtype, "_f32" if ieee else "_xf32")
        least = 2 if dtype == "int8" else 4  # they are twice as deep
        count = sum(row["opcodes"][op] for op in found)
        if count < least or not all(op.endswith(suffix) for op in found):
            yield f"needs {least} v_mfma of {suffix[1:]}, has {count} of {found}"
        return
    kind = "I" if dtype == "int8" else "H"
    few = constants.get("BM", 64) < 64
    core = {"cuda-90": f"{kind}GMMA", "cuda-100": f"UTC{kind}MMA"}.get(row["target"], f"{kind}MMA")
    core = f"{kind}MMA" if few else core
    ends = ".S8.S8" if dtype == "int8" else f".{dtype.upper()}"
    ends = "" if core.startswith("UTC") else ends  # its operands' types stand in a descriptor
    fits = all(op.startswith(core) and op.removesuffix(".SAT").endswith(ends) for op in found)
    if bool(found) is ieee or not fits:
        yield f"needs {'no tensor cores' if ieee else core + ends}, has {found}"


def _repeats(row: Mapping[str, Any]) -> Iterator[str]:
    """Of integer products; of the others the table tells."""
    found = row["repeats"]
    most = KNOWN.get(key(row), ({}, ""))[0].get("repeats", 1)
    if _is_integer(row) and found is not None and not 1 <= found <= most:
        yield f"products are made {found} times, at most {most}"


def _wide_accesses(row: Mapping[str, Any]) -> Iterator[str]:
    name, patterns = row["name"], WIDE[row["target"].split("-")[0]]
    least = next((n for pattern, n in patterns.items() if re.match(pattern, name)), (0, 0))
    for access, number in zip(("loads_16", "stores_16"), least, strict=True):
        if row[access] < number:
            yield f"{access} is {row[access]}, at least {number}"
    if re.match("(int8_)?perturbed_weights", name) and least != (0, 0):
        # What else is loaded are scalars: the key and eps.
        most = 8 * row["constants"]["QUERIES"]
        if row["loads"] > most:
            yield f"{row['loads']} loads, at most {most}"


def _floats(row: Mapping[str, Any]) -> Iterator[str]:
    """Scalars come as float64 and are rounded before they are used. Integer kernels have neither;
    conversions and reciprocals are the compiler's way to divide. A rule takes `1 - beta` before."""
    found = {"DADD", "DMUL", "DFMA", "DSETP"} & {*row["opcodes"]}
    if RULES[row["constants"].get("RULE", "sgd")].settings:
        found -= {"DADD"}
    if found and "fp64" not in row["name"]:
        yield f"float64 arithmetic: {', '.join(sorted(found))}"
    found = {"FADD", "FMUL", "FFMA", "FSETP", "HADD2", "HMUL2"} & {*row["opcodes"]}
    if found and _is_integer(row):
        yield f"float arithmetic: {', '.join(sorted(found))}"


__all__ = ["KNOWN", "SHARED", "WIDE", "key", "violations"]
