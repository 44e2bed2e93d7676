"""Compile a configuration for a GPU that need not be there; what the machine code says.

Runs in a process without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experiments.static.config import Config
from experiments.static.machine import (
    GLOBAL,
    TENSOR,
    WIDE,
    Program,
    grouped,
    parse_amdgcn,
    parse_sass,
)
from experiments.static.roofline import predict, repeats
from experiments.static.sources import digest

GPUS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "cuda-100": GPUTarget("cuda", 100, 32),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNED = [["tt.divisibility", 16]]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_for(config: Config, target: str) -> dict[str, Any]:
    """A row of the table.

    registers: of a thread (gfx942: vector registers; scalar_registers beside them).
    spills: instructions that access local memory (gfx942: vector registers spilled).
    scalar_spills: gfx942 alone, scalars moved to lanes of vector registers.
    local: bytes of stack and local memory of a thread. shared: bytes a program.
    instructions, opcodes: of the whole text. outside, loop: what a warp executes outside of the
    main loop and in a turn of it (`Program.executed`); 16-byte accesses and all accesses to global
    memory of the text.
    """
    names = config.kernel.arg_names
    if {*names} != {*config.signature, *config.constants}:
        wrong = {*names} ^ {*config.signature, *config.constants}
        raise ValueError(f"{config.name} does not fit its kernel in {', '.join(sorted(wrong))}")
    source = ASTSource(
        config.kernel,
        signature=config.signature | dict.fromkeys(config.constants, "constexpr"),
        constexprs=config.constants,
        attrs={(names.index(name),): ALIGNED for name in config.aligned},
    )
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUS[target], options=options)
    if target.startswith("cuda"):
        found, program = _nvidia(compiled.asm["cubin"])
        size = len(compiled.asm["cubin"])
    else:
        found, program = _amd(compiled.asm["amdgcn"])
        size = len(compiled.asm["hsaco"])
    row = {
        "target": target,
        "name": config.name,
        "hash": digest(config),
        "warps": config.warps,
        "stages": config.stages,
        "constants": config.plain_constants,
        "problem": config.problem,
        "bytes": size,
        **found,
        "shared": compiled.metadata.shared,
    }
    return row | _instructions(config, target, program)


def _instructions(config: Config, target: str, program: Program) -> dict[str, Any]:
    """What is counted in the program, and what follows from it."""
    outside, loop = program.executed()
    accesses = {op: n for op, n in program.opcodes.items() if GLOBAL.match(op)}
    stores = {op for op in accesses if op.startswith("ST") or "_store" in op}
    wide = {op for op in accesses if WIDE.match(op)}
    row: dict[str, Any] = {
        "instructions": program.opcodes.total(),
        "loop_instructions": loop.total(),
        "loads": sum(n for op, n in accesses.items() if op not in stores),
        "loads_16": sum(n for op, n in accesses.items() if op in wide - stores),
        "stores": sum(n for op, n in accesses.items() if op in stores),
        "stores_16": sum(n for op, n in accesses.items() if op in wide & stores),
        "tensor": sorted(op for op in program.opcodes if TENSOR.match(op)),
        "repeats": repeats(config.constants, config.warps, loop),
        "noise_instructions": _per_noise(config, target, outside, loop),
        "opcodes": grouped(program.opcodes),
        "outside": grouped(outside),
        "loop": grouped(loop),
    }
    if target == "cuda-90" and config.problem:
        row["h200"] = predict(config.problem, config.warps, row["outside"], row["loop"])
    return row


def _per_noise(
    config: Config, target: str, outside: Counter[str], loop: Counter[str]
) -> float | None:
    """Instructions of a thread for an element of z: all of a turn of the main loop (or all, where
    there is no loop), loads, rounding and products included, over the elements a thread makes."""
    if "noise" not in config.problem:
        return None
    threads = config.warps * int(GPUS[target].warp_size)
    instructions = (loop or outside).total()
    return round(instructions * threads / int(config.problem["noise"]), 2)


def _nvidia(cubin: bytes) -> tuple[dict[str, Any], Program]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    program = Program(parse_sass(text))
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = [n for op, n in program.opcodes.items() if re.match(r"(LDL|STL)\b", op)]
    row = {
        "registers": used["REG"],
        "spills": sum(local),
        "local": used["STACK"] + used["LOCAL"],
    }
    return row, program


def _tool(name: str, *arguments: str) -> str:
    """A program of Triton's own wheel."""
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(text: str) -> tuple[dict[str, Any], Program]:
    """The assembler's notes say what is used."""
    names = {
        "registers": "vgpr_count",
        "scalar_registers": "sgpr_count",
        "spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
        "local": "private_segment_fixed_size",
    }
    row = {}
    for ours, theirs in names.items():
        match = re.search(rf"\.{theirs}:\s+(\d+)", text)
        if match is None:
            raise ValueError(f"the assembler says nothing of {theirs}")
        row[ours] = int(match.group(1))
    return row, Program(parse_amdgcn(text))


__all__ = ["GPUS", "compile_for"]
