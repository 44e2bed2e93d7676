"""Graphs of instructions and hashes of sources, made by hand."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from experiments.static import kernels
from experiments.static.machine import Program, grouped, parse_amdgcn, parse_sass
from experiments.static.sources import digest, sources


def sass(*lines: str) -> Program:
    """A program from labels and instructions."""
    text = "\n".join(x if x.endswith(":") else f"        /*0000*/  {x} ;" for x in lines)
    return Program(parse_sass(text))


def test_a_loop_with_a_wait_behind_the_end() -> None:
    """As on sm_100: the wait is written behind EXIT and leads back into the loop."""
    program = sass(
        "MOV R0, R1",
        "@!P0 BRA `(.L_end)",
        ".L_loop:",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "SYNCS.PHASECHK P0, [UR15], R4",
        "@!P0 BRA `(.L_wait)",
        ".L_go:",
        "UTCHMMA gdesc[UR18], gdesc[UR20]",
        "BRA.U !UP2, `(.L_loop)",
        ".L_end:",
        "STG.E desc[UR4][R2.64], R0",
        "EXIT",
        ".L_wait:",
        "SYNCS.PHASECHK P0, [UR15], R4",
        "@!P0 BRA `(.L_wait)",
        "BRA `(.L_go)",
        ".L_pad:",
        "BRA `(.L_pad)",
        "NOP",
    )
    outside, loop = program.executed()
    assert grouped(loop) == {"BRA": 4, "SYNCS": 2, "LDG": 1, "UTCHMMA": 1}
    assert grouped(outside) == {"BRA": 1, "EXIT": 1, "MOV": 1, "STG": 1}
    assert program.opcodes.total() == 14


def test_the_inner_loop_of_a_nest() -> None:
    program = sass(
        ".L_outer:",
        "MOV R0, R1",
        ".L_inner:",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P0 BRA `(.L_inner)",
        "@P1 BRA `(.L_outer)",
        "EXIT",
    )
    outside, loop = program.executed()
    assert loop == Counter({"HMMA.16816.F32.BF16": 1, "BRA": 1})
    assert outside == Counter({"MOV": 1, "BRA": 1, "EXIT": 1})


def test_the_way_with_the_most_wide_accesses() -> None:
    """Not the shortest one, which skips, nor the one with more but narrower accesses."""
    program = sass(
        "@P0 EXIT",
        "@P1 BRA `(.L_narrow)",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "FADD R4, R4, R5",
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
        ".L_narrow:",
        "LDG.E R4, desc[UR4][R2.64]",
        "LDG.E R5, desc[UR4][R2.64]",
        "STG.E desc[UR4][R2.64], R4",
        "STG.E desc[UR4][R2.64], R5",
        "EXIT",
    )
    outside, loop = program.executed()
    assert not loop
    assert grouped(outside) == {"EXIT": 2, "BRA": 1, "FADD": 1, "LDG": 1, "STG": 1}


def test_calls() -> None:
    """A function counts where it is called; a call to a local label (sm_80) is a jump."""
    program = sass(
        ".L_loop:",
        "LDG.E R4, desc[UR4][R2.64]",
        "CALL.REL.NOINC `($__internal_0_$div)",
        "@P5 CALL.REL.NOINC `(.L_out)",
        "BRA `(.L_loop)",
        ".L_out:",
        "EXIT",
        "$__internal_0_$div:",
        "IMAD R0, R1, R2, R3",
        "RET.REL.NODEC R74 `(kernel)",
    )
    outside, loop = program.executed()
    assert grouped(loop) == {"CALL": 2, "BRA": 1, "IMAD": 1, "LDG": 1, "RET": 1}
    assert grouped(outside) == {"EXIT": 1}


def test_what_has_no_end_or_no_known_jump() -> None:
    with pytest.raises(ValueError, match="the program has no end"):
        sass(".L_a:", "BRA `(.L_a)").executed()
    with pytest.raises(ValueError, match="indirect branch"):
        sass("BRX R2 -0x10", "EXIT")


def test_amdgcn() -> None:
    text = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.Ltmp0:
	s_branch .LBB0_2
.LBB0_1:                                ; in Loop
	v_add_f32_e32 v0, v1, v2
	s_endpgm
.LBB0_2:                                ; =>This Inner Loop
	global_load_dwordx4 v[0:3], v4, s[0:1]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc0 .LBB0_2
	s_branch .LBB0_1
.Lfunc_end0:
	s_nop 0
"""
    program = Program(parse_amdgcn(text))
    outside, loop = program.executed()
    assert set(loop) == {"global_load_dwordx4", "v_mfma_f32_16x16x16_bf16", "s_cbranch_scc0"}
    assert set(outside) == {"s_load_dwordx2", "s_branch", "v_add_f32", "s_endpgm"}
    assert program.opcodes.total() == 8


# ---- hashes

KERNEL = '''
from zo_kernels.triton.shim import jit, tl

FIELDS = tl.constexpr(12)


@jit
def helper(x):
    return x * FIELDS


@jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """What it does."""
    x = helper(tl.load(x_ptr))  # why
    tl.store(x_ptr, x)
'''


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The kernel of a source, in a module of one name."""

    def kernel(text: str) -> Any:
        path = tmp_path / f"made{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("made", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "made", module)
        spec.loader.exec_module(module)
        return module.kernel

    return kernel


def test_a_source_covers_what_it_calls(load: Callable[[str], Any]) -> None:
    before = sources(load(KERNEL))
    assert set(before) == {"made.kernel", "made.helper", "made.FIELDS"}
    assert before["made.FIELDS"] == "12"
    for old, new in (
        ("tl.constexpr(12)", "tl.constexpr(13)"),
        ("x * FIELDS", "x + FIELDS"),
        ("tl.store(x_ptr, x)", "tl.store(x_ptr, x + 1)"),
        ("@jit\ndef kernel", '@jit(do_not_specialize=["x_ptr"])\ndef kernel'),
    ):
        assert sources(load(KERNEL.replace(old, new))) != before, new


def test_a_source_is_without_comments_and_docstrings(load: Callable[[str], Any]) -> None:
    before = sources(load(KERNEL))
    text = KERNEL.replace("# why", "# why not").replace("What it does.", "And why.")
    text = text.replace("    tl.store", "\n    # before\n    tl.store")
    assert sources(load(text)) == before
    with pytest.raises(TypeError, match=r"made.helper names FIELDS: no jit function"):
        sources(load(KERNEL.replace("tl.constexpr(12)", "12")))


def test_a_digest_covers_the_configuration() -> None:
    digests = {
        digest(kernels.sample("normal")),
        digest(kernels.sample("normal", int64=True)),
        digest(kernels.sample("bits")),
        digest(kernels.paired_linear("normal", "tf32", 64)),
        digest(kernels.paired_linear("normal", "tf32", 64, shared=True)),
        digest(kernels.paired_linear("normal", "tf32", 64, ragged=True)),
    }
    assert len(digests) == 6
    assert all(re.fullmatch(r"[0-9a-f]{16}", d) for d in digests)
    assert digest(kernels.sample("normal")) in digests
