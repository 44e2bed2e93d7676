"""The shipped kernels as machine code for GPUs that need not be there.

One worker process compiles them all (38 kernels, about half a second each): Triton's interpreter,
which the other tests use, replaces the compiler in a process. Under xdist, `--dist loadfile` keeps
this file on one worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
KIB = 1024
SHARED = {
    "cuda-80": 163 * KIB,
    "cuda-90": 227 * KIB,
    "cuda-100": 227 * KIB,
    "hip-gfx942": 64 * KIB,
}
TARGETS = pytest.mark.parametrize("target", SHARED)


@cache
def compiled() -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.zo_kernels._compile_worker", *SHARED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def rows_of(target: str) -> list[dict[str, Any]]:
    rows = [row for row in compiled() if row["target"] == target]
    assert len(rows) >= 5
    return rows


def row_of(name: str, target: str = "cuda-90") -> dict[str, Any]:
    (row,) = [row for row in rows_of(target) if row["name"] == name]
    return row


def instructions(name: str) -> int:
    """Static instructions on sm_90; a thread of these kernels serves 8 elements."""
    return sum(row_of(name)["sass"].values())


@TARGETS
def test_gives_machine_code(target: str) -> None:
    for row in rows_of(target):
        assert row["bytes"] > 1000, row["name"]
        if target.startswith("cuda"):
            assert row["sass"].get("EXIT", 0) >= 1, row["name"]


@TARGETS
def test_needs_no_local_memory(target: str) -> None:
    """No spills, no arrays on the stack: LDL and STL are how SASS reaches either."""
    for row in rows_of(target):
        if target.startswith("cuda"):
            local = [op for op in row["sass"] if op.split(".")[0] in ("LDL", "STL")]
            assert not local, row["name"]
        else:
            needs = {row["sgpr_spills"], row["vgpr_spills"], row["private"]}
            assert needs == {0}, row["name"]


@TARGETS
def test_shared_memory_is_small(target: str) -> None:
    """Far below the limit: noise is put in order in registers, or in a few KiB."""
    for row in rows_of(target):
        assert row["shared"] <= SHARED[target]
        if not row["name"].startswith("paired_linear"):  # which stages the tiles of its products
            assert row["shared"] <= 8 * KIB, row["name"]


@TARGETS
def test_flat_weights_move_16_bytes_at_a_time(target: str) -> None:
    for row in rows_of(target):
        if not row["name"].endswith("-flat"):
            continue
        if target.startswith("hip") and "bf16" in row["name"]:
            continue  # 256 threads to a block of 1024: 4 elements, 8 bytes a thread
        if target.startswith("cuda"):
            ops = row["sass"]
            assert ops.get("LDG.E.128", 0) >= 1 and ops.get("STG.E.128", 0) >= 2, row["name"]
            # What is left are scalars: the key and eps.
            assert sum(n for op, n in ops.items() if op.startswith("LDG.E")) <= 8, row["name"]
        else:
            assert row["load"] >= 1 and row["store"] >= 2, row["name"]


@TARGETS
def test_products_run_on_tensor_cores(target: str) -> None:
    """wgmma on sm_90 from 64 rows on, tcgen05 on sm_100; ieee fp32 has no tensor core."""
    for row in rows_of(target):
        if not row["name"].startswith("paired_linear"):
            continue
        if target.startswith("hip"):
            assert row["mfma"] >= 8, row["name"]
            continue
        cores = {op.split(".")[0] for op in row["sass"]} & {"HMMA", "HGMMA", "UTCHMMA"}
        few_rows = "HMMA" if row["name"].endswith("-16") else "HGMMA"
        wanted = {"cuda-80": "HMMA", "cuda-90": few_rows, "cuda-100": "UTCHMMA"}[target]
        assert cores == (set() if "-ieee-" in row["name"] else {wanted}), row["name"]
        wide = ("LDGSTS.E.BYPASS.128", "LDG.E.128")
        assert sum(row["sass"].get(op, 0) for op in wide) >= 4, row["name"]


def test_cost_of_a_pair_of_products() -> None:
    """Measured with Triton 3.9: 1520 for 16 normals a thread and turn (870 in the loop), 1632 for
    8 signs (272 in the loop)."""
    assert instructions("paired_linear-normal-bf16-16") <= 1700
    assert instructions("paired_linear-rademacher-bf16-256") <= 1850


@pytest.mark.parametrize(
    "name", ["update-normal-fp32", "update-normal-bf16", "update-rademacher-fp32"]
)
def test_update_has_a_path_of_16_byte_accesses(name: str) -> None:
    ops = row_of(name)["sass"]
    assert ops.get("LDG.E.128", 0) >= 1 and ops.get("STG.E.128", 0) >= 1


def test_fp32_kernels_do_no_fp64_arithmetic() -> None:
    """Scalars come as float64 and are rounded before they are used."""
    for row in rows_of("cuda-90"):
        if "fp64" not in row["name"]:
            assert not {"DADD", "DMUL", "DFMA", "DSETP"} & {*row["sass"]}, row["name"]


def test_cost_of_a_normal() -> None:
    """Measured with Triton 3.9: 376 for a kernel that makes and stores 8 normals a thread."""
    assert instructions("sample-normal") <= 450


def test_cost_of_a_sign() -> None:
    """Measured with Triton 3.9: 176 for 8 signs, of which Philox is the most."""
    assert instructions("sample-rademacher") <= 250


def test_cost_of_a_perturbed_pair() -> None:
    """Measured with Triton 3.9: 448 (normal, fp32) and 248 (signs, bf16) for 8 weights."""
    assert instructions("perturbed_weights-normal-fp32-flat") <= 530
    assert instructions("perturbed_weights-rademacher-bf16-flat") <= 330
