"""What must hold of every row, whatever the version of the compiler, and where it does not.

No spills, no local memory, shared memory within the GPU's limit (8 KiB where nothing is
multiplied), tensor cores where intended, 16-byte accesses where alignment allows, no float64
arithmetic in kernels of other types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KIB = 1024
SHARED = {
    "cuda-80": 163 * KIB,
    "cuda-90": 227 * KIB,
    "cuda-100": 227 * KIB,
    "hip-gfx942": 64 * KIB,
}

_SCALARS = "scalars move to lanes of vector registers, not to memory"
_RAGGED = "sizes that are no multiples of 16 are read element by element"
# What is known to break a limit: the value there (Triton 3.9), and why. A test fails when the table
# has another value, also a better one.
KNOWN: dict[str, tuple[dict[str, int], str]] = {
    "hip-gfx942/paired_linear-normal-mixed-16-shared": ({"scalar_spills": 6}, _SCALARS),
    "hip-gfx942/paired_linear-normal-mixed-16-ragged": ({"scalar_spills": 14}, _SCALARS),
    "hip-gfx942/paired_linear-normal-bf16-128-ragged": ({"scalar_spills": 22}, _SCALARS),
    "cuda-80/paired_linear-normal-bf16-128-ragged": ({"spills": 19, "local": 40}, _RAGGED),
    "cuda-90/paired_linear-normal-bf16-64-ragged": ({"spills": 4, "local": 8}, _RAGGED),
    "cuda-90/paired_linear-rademacher-tf32-16-ragged": ({"spills": 2, "local": 8}, _RAGGED),
}


def key(row: Mapping[str, Any]) -> str:
    return f"{row['target']}/{row['name']}"


def violations(row: Mapping[str, Any]) -> list[str]:
    """What a row breaks beyond what is known, in words."""
    rules = (_size, _limits, _tensor_cores, _wide_accesses, _float64)
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


def _tensor_cores(row: Mapping[str, Any]) -> Iterator[str]:
    """wgmma (sm_90) and tcgen05 (sm_100) from 64 rows on; ieee fp32 has none on NVIDIA."""
    if "flops" not in row["problem"]:
        return
    constants, found = row["constants"], row["tensor"]
    dtype = "bf16" if constants.get("DOT") == "bf16" else "tf32"
    ieee = dtype == "tf32" and constants.get("PRECISION") == "ieee"
    if row["target"] == "hip-gfx942":
        suffix = "_bf16" if dtype == "bf16" else "_f32" if ieee else "_xf32"
        count = sum(row["opcodes"][op] for op in found)
        if count < 8 or not all(op.endswith(suffix) for op in found):
            yield f"needs 8 v_mfma of {suffix[1:]}, has {count} of {found}"
        return
    few = constants.get("BM", 64) < 64
    core = {"cuda-80": "HMMA", "cuda-90": "HGMMA", "cuda-100": "UTCHMMA"}[row["target"]]
    core = "HMMA" if few else core
    ends = "" if core == "UTCHMMA" else f".{dtype.upper()}"
    fits = all(op.startswith(core) and op.endswith(ends) for op in found)
    if bool(found) is ieee or not fits:
        yield f"needs {'no tensor cores' if ieee else core + ends}, has {found}"


def _wide_accesses(row: Mapping[str, Any]) -> Iterator[str]:
    name, cuda = row["name"], row["target"].startswith("cuda")
    halves = not cuda and "bf16" in name  # 256 threads to a block of 1024: 8 bytes a thread
    loads, stores = 0, 0
    if name.startswith("perturbed_weights") and "-flat" in name and not halves:
        loads, stores = 1, 2
        # What else is loaded are scalars: the key and eps.
        most = 8 * row["constants"]["QUERIES"]
        if row["loads"] > most:
            yield f"{row['loads']} loads, at most {most}"
    elif name.startswith("stage") and "-flat" in name and not halves:
        loads, stores = 1, 3 if "pending" in name else 2
    elif name.startswith("update") and not halves:
        loads, stores = 1, 1
    elif name.startswith("sample") and "sparse" not in name:
        stores = 1
    elif name.startswith("paired_linear") and "-ragged" not in name:
        loads = 4 if cuda else 2
    for access, least in (("loads_16", loads), ("stores_16", stores)):
        if row[access] < least:
            yield f"{access} is {row[access]}, at least {least}"


def _float64(row: Mapping[str, Any]) -> Iterator[str]:
    """Scalars come as float64 and are rounded before they are used."""
    found = {"DADD", "DMUL", "DFMA", "DSETP"} & {*row["opcodes"]}
    if found and "fp64" not in row["name"]:
        yield f"float64 arithmetic: {', '.join(sorted(found))}"


__all__ = ["KNOWN", "SHARED", "key", "violations"]
