"""Compile the shipped kernels for GPUs that need not be there; print what came out as JSON.

Run as a process of its own, without TRITON_INTERPRET:
`python -m tests.zo_kernels._compile_worker cuda-90 hip-gfx942`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import zo_kernels._paired_linear
import zo_kernels.perturbed_weights
import zo_kernels.sample
import zo_kernels.update  # noqa: F401
from zo_kernels._layout import PER_CALL
from zo_kernels.noise import KIND

TARGETS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "cuda-100": GPUTarget("cuda", 100, 32),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Config:
    """One specialisation of a kernel, as a launch makes it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16
    warps: int
    stages: int = 3


def _module(name: str) -> Any:
    return sys.modules[f"zo_kernels.{name}"]


def _wide(dtype: str) -> Any:
    return tl.float64 if dtype == "fp64" else tl.float32


def perturbed_weights(
    noise: str, dtype: str, flat: bool, out: str | None = None, int64: bool = False
) -> Config:
    module = _module("perturbed_weights")
    pointers = {
        "w_ptr": f"*{dtype}",
        "out_ptr": f"*{out or dtype}",
        "key_ptr": "*i64",
        "eps_ptr": "*fp64",
    }
    integers = "tensor first_query start stop elements cols padded_cols inner s_row s_outer"
    integers += " s_inner t_row t_outer t_inner half_stride"
    aligned = (*pointers, "elements", "half_stride")
    return Config(
        f"perturbed_weights-{noise}-{dtype}{f'-{out}' if out else ''}-"
        f"{'flat' if flat else 'general'}{'-int64' if int64 else ''}",
        module._perturbed_weights_kernel,
        pointers | dict.fromkeys(integers.split(), "i32") | {"scale": "fp64"},
        {
            "QUERIES": 1,
            "NOISE": KIND[noise],
            "PER": PER_CALL[noise],
            "FLAT": flat,
            "INT64": int64,
            "WIDE": _wide(dtype),
            "BLOCK": module.BLOCK,
        },
        aligned if flat else tuple(pointers),
        module.WARPS,
    )


def update(noise: str, dtype: str, int64: bool = False) -> Config:
    module = _module("update")
    pointers = {
        "table_ptr": "*i64",
        "scale_ptr": "*fp64",
        "block_ptr": "*i32",
        "key_ptr": "*i64",
        "coeff_ptr": "*fp64",
        "lr_ptr": "*fp64",
        "decay_ptr": "*fp64",
        "skip_ptr": "*fp32",
    }
    return Config(
        f"update-{noise}-{dtype}{'-int64' if int64 else ''}",
        module._update_kernel,
        pointers | {"queries": "i32"},
        {
            "DTYPE": TYPES[dtype],
            "WIDE": _wide(dtype),
            "NOISE": KIND[noise],
            "PER": PER_CALL[noise],
            "INT64": int64,
            "BLOCK": module.BLOCK,
        },
        tuple(pointers),
        module.WARPS,
    )


def sample(noise: str) -> Config:
    module = _module("sample")
    out = {"sparse_int8": "*i8", "bits": "*i64"}.get(noise, "*fp32")
    integers = ["tensor", "third", "p0", "r_max", "elements"]
    return Config(
        f"sample-{noise}",
        module._sample_kernel,
        {"out_ptr": out, "key_ptr": "*i64", **dict.fromkeys(integers, "i32")},
        {"NOISE": KIND[noise], "PER": PER_CALL[noise], "INT64": False, "BLOCK": module.BLOCK},
        ("out_ptr", "key_ptr", "elements"),
        4,
    )


def paired_linear(
    noise: str, kind: str, rows: int, shared: bool = False, int64: bool = False
) -> Config:
    """The tile for `rows` of a kind of operands; "mixed" rounds fp32 ones to bf16."""
    module = _module("_paired_linear")
    (tile,) = [tile for tile in module.TILES[kind] if tile.rows == rows]
    dtype = "bf16" if kind == "bf16" else "fp32"
    out = "bf16" if kind in ("bf16", "mixed") else "fp32"
    read = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr"), f"*{dtype}")
    pointers = read | {"y_ptr": f"*{out}", "key_ptr": "*i64", "eps_ptr": "*fp64"}
    sizes = ["M", "N", "K", "s_xm", "s_wn", "x_half", "y_half"]
    if shared:
        sizes.remove("x_half")
    integers = ["tensor", "bias_tensor", "first_query", *sizes]
    constants = dict.fromkeys(("s_xk", "s_wk", "s_b"), 1) | ({"x_half": 0} if shared else {})
    return Config(
        f"paired_linear-{noise}-{kind}-{rows}{'-shared' if shared else ''}"
        f"{'-int64' if int64 else ''}",
        module._paired_linear_kernel,
        pointers | dict.fromkeys(integers, "i32") | {"scale": "fp64", "bias_scale": "fp64"},
        constants
        | {
            "NOISE": KIND[noise],
            "PAIR": True,
            "SHARED": shared,
            "BIAS": True,
            "RELU": True,
            "DOT": TYPES[out],
            "PRECISION": "ieee" if out == "bf16" else kind,
            "UPCAST": False,
            "INT64": int64,
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
        },
        (*pointers, *sizes),
        tile.warps,
        tile.stages,
    )


def configs(target: str) -> Iterator[Config]:
    """Everything that ships on sm_90, the heaviest ones elsewhere."""
    yield perturbed_weights("normal", "fp32", flat=True)
    yield perturbed_weights("normal", "bf16", flat=False)
    yield perturbed_weights("rademacher", "bf16", flat=True)
    yield update("normal", "bf16")
    yield update("rademacher", "fp32")
    yield paired_linear("rademacher", "bf16", 256)
    if target == "cuda-80":
        yield paired_linear("normal", "tf32x3", 64)
    if target == "cuda-90":
        yield paired_linear("normal", "bf16", 16)
        yield paired_linear("rademacher", "mixed", 64, shared=True)
        yield paired_linear("normal", "tf32", 64, int64=True)
        yield paired_linear("normal", "ieee", 64)
        yield perturbed_weights("rademacher", "fp32", flat=False)
        yield perturbed_weights("normal", "fp64", flat=True, out="bf16")
        yield perturbed_weights("normal", "fp32", flat=False, int64=True)
        yield update("normal", "fp32")
        yield update("normal", "fp64", int64=True)
        yield from map(sample, PER_CALL)


def compile_for(config: Config, target: str) -> dict[str, Any]:
    names = config.kernel.arg_names
    assert {*names} == {*config.signature, *config.constants}, config.name
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
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    binary = compiled.asm["cubin" if target.startswith("cuda") else "hsaco"]
    row = {
        "target": target,
        "name": config.name,
        "bytes": len(binary),
        "shared": compiled.metadata.shared,
    }
    if target.startswith("cuda"):
        return row | {"sass": dict(sass(binary))}
    return row | amdgcn(compiled.asm["amdgcn"])


def sass(cubin: bytes) -> Counter[str]:
    """Instructions of a cubin, by opcode."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    # An instruction: /*0a10*/ @!P0 LDG.E.128 R4, ...
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    return Counter(opcodes)


def amdgcn(text: str) -> dict[str, int]:
    """What the assembler's notes say about registers and memory; 16-byte accesses."""
    names = {
        "sgpr_spills": "sgpr_spill_count",
        "vgpr_spills": "vgpr_spill_count",
        "private": "private_segment_fixed_size",
    }
    found = {k: re.search(rf"\.{v}:\s+(\d+)", text) for k, v in names.items()}
    counts = {k: int(match.group(1)) for k, match in found.items() if match}
    for access in ("load", "store"):
        counts[access] = len(re.findall(rf"(?:global|buffer)_{access}_dwordx4", text))
    counts["mfma"] = len(re.findall(r"\bv_mfma_", text))
    return counts


def main(targets: list[str]) -> None:
    rows = [compile_for(config, target) for target in targets for config in configs(target)]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
