"""The static table: its registry, roofline, rules and command, each by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("tyro")

import zo_kernels
from experiments.static import __main__ as command
from experiments.static import compiler, kernels, registry
from experiments.static.roofline import Peaks, predict, repeats, tensor_operations
from experiments.static.rules import SHARED, violations
from experiments.static.table import RESULTS, read

# ---- registry


def test_every_module_with_configurations_is_registered() -> None:
    folder = Path(registry.__file__).parent
    with_configs = {p.stem for p in folder.glob("*.py") if "\ndef configs(" in p.read_text()}
    assert with_configs - {"registry"} == {*registry.MODULES}


@pytest.mark.parametrize("target", registry.TARGETS)
def test_every_kernel_is_there(target: str) -> None:
    """All of `zo_kernels` on sm_90, the integer ones on each target."""
    shipped = set()
    for path in Path(zo_kernels.__file__).parent.glob("*/*.py"):
        if target == "cuda-90" or path.stem.startswith("int"):
            found = re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
            shipped |= {f"zo_kernels.{path.parent.name}.{path.stem}.{name}" for name in found}
    functions = [getattr(c.kernel, "fn", c.kernel) for c in registry.configs(target)]
    assert len(shipped) >= 9
    assert shipped <= {f"{f.__module__}.{f.__name__}" for f in functions}


def test_one_list_of_targets() -> None:
    for targets in (command.ALL, compiler.GPUS, SHARED):
        assert tuple(targets) == registry.TARGETS


def test_the_registry_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"target must be one of .* got 'cuda-70'"):
        registry.configs("cuda-70")
    monkeypatch.setattr(registry, "MODULES", ("kernels", "kernels"))
    with pytest.raises(ValueError, match=r"two configurations are named .* for cuda-90"):
        registry.configs("cuda-90")
    monkeypatch.setattr(registry, "MODULES", ("kernels",))
    poor = kernels.sample("normal")
    del poor.problem["bytes"]
    monkeypatch.setattr(kernels, "configs", lambda target: [poor])
    with pytest.raises(ValueError, match="the problem of sample-normal lacks bytes"):
        registry.configs("cuda-90")


# ---- roofline

PEAKS = Peaks(
    memory=1e9,
    bf16=4e12,
    tf32=2e12,
    int8=8e12,
    multiprocessors=2,
    clock=1e9,
    issue=4,
    integer=64,
    special=16,
)


def test_roofline_by_hand() -> None:
    problem = {"bytes": 3000, "programs": 5, "turns": 10}
    outside = {"MUFU": 4, "EXIT": 2}
    loop = {"IADD3": 10, "IMAD": 5, "MUFU": 1, "FFMA": 20}
    found = predict(problem, 4, outside, loop, PEAKS)
    # The busier of two multiprocessors runs three programs of 4 warps.
    assert found == {
        "us": 3.0,
        "bound": "memory",
        "memory_us": 3.0,
        "issue_us": round((6 + 360) * 12 / 4 / 1e3, 2),
        "tensor_us": 0.0,
        "integer_us": round(100 * 12 / 2 / 1e3, 2),
        "multiply_us": round(50 * 12 / 2 / 1e3, 2),
        "fp64_us": 0.0,
        "special_us": round(14 * 12 * 2 / 1e3, 2),
    }
    assert predict(problem | {"bytes": 3}, 4, outside, loop, PEAKS)["bound"] == "issue"


def test_roofline_of_products() -> None:
    assert tensor_operations("HGMMA.64x32x16.F32.BF16") == ("bf16", 2 * 64 * 32 * 16 / 4)
    assert tensor_operations("IGMMA.64x64x32.S8.S8") == ("int8", 2 * 64 * 64 * 32 / 4)
    assert tensor_operations("HMMA.1688.F32.TF32") == ("tf32", 2 * 16 * 8 * 8)
    assert tensor_operations("IMMA.16832.S8.S8.SAT") == ("int8", 2 * 16 * 8 * 32)
    assert tensor_operations("v_mfma_i32_32x32x16_i8") == ("int8", 2 * 32 * 32 * 16)
    assert tensor_operations("v_mfma_f32_16x16x8_xf32") == ("tf32", 2 * 16 * 16 * 8)
    for opcode in ("FFMA", "IMAD.WIDE", "UTCIMMA", "v_mul_i32_i24"):
        assert tensor_operations(opcode) is None
    # One program of 8 warps on one of two multiprocessors of half the operations each.
    problem = {"bytes": 1, "programs": 1, "turns": 1000}
    for opcode, peak, k in (
        ("HGMMA.64x32x16.F32.BF16", 4e12, 16),
        ("IGMMA.64x32x32.S8.S8", 8e12, 32),
    ):
        found = predict(problem, 8, {}, {opcode: 4}, PEAKS)
        assert found["bound"] == "tensor"
        assert found["us"] == round(1000 * 4 * 2 * 2 * 64 * 32 * k / (peak / 2) * 1e6, 2)


def test_how_often_products_are_made() -> None:
    """A tile of 64 x 32 x 64 is 32 products; those of both halves are 16 of each of four warps."""
    constants = {"BM": 64, "BN": 32, "BK": 64, "PAIR": True}
    product = "IMMA.16832.S8.S8.SAT"
    assert repeats(constants, 4, {product: 16, "IMAD": 99}) == 1
    assert repeats(constants, 8, {product: 16}) == 2
    assert repeats(constants | {"PAIR": False}, 4, {product: 8}) == 1
    assert repeats(constants, 4, {"UTCIMMA": 4}) is None


def test_executed_products_cover_the_problem() -> None:
    """Counted in the machine code, they are those of the tiles, which a linear layer fills."""
    for row in read()["rows"]:
        if "flops" not in row["problem"] or row["repeats"] is None:
            continue
        problem, constants = row["problem"], row["constants"]
        size = constants["BM"] * constants["BN"] * constants["BK"]
        tiles = size * problem["turns"] * problem["programs"] * (4 if constants["PAIR"] else 2)
        if "linear" in row["name"] or "matmul" in row["name"]:
            assert tiles == problem["flops"], row["name"]
        if row["target"] == "cuda-90":
            times = 3 if constants.get("PRECISION") == "tf32x3" else 1
            if times == 3 and "conv" in row["name"] and constants["BM"] == 64:
                times = 5  # the first two of the three are made twice, by both groups of warps
            assert row["repeats"] == times, row["name"]


# ---- rules

BROKEN = {
    "spills": ("cuda-90/update-normal-fp32", {"spills": 1}, "spills is 1, at most 0"),
    "local": ("hip-gfx942/sample-normal", {"local": 4}, "local is 4, at most 0"),
    "scalars": ("hip-gfx942/sample-normal", {"scalar_spills": 1}, "scalar_spills is 1"),
    "shared": ("cuda-80/sample-normal", {"shared": 8193}, "shared is 8193, at most 8192"),
    "limit": ("cuda-80/paired_linear-normal-bf16-64", {"shared": 166913}, "at most 166912"),
    "known": (
        "hip-gfx942/paired_linear-normal-mixed-16-shared",
        {"scalar_spills": 7},
        "scalar_spills is 7, at most 6",
    ),
    "size": ("cuda-90/sample-normal", {"bytes": 1000}, "no machine code"),
    "core": (
        "cuda-90/paired_linear-normal-bf16-64",
        {"tensor": ["HMMA.16816.F32.BF16"]},
        "needs HGMMA.BF16",
    ),
    "dtype": (
        "cuda-80/paired_linear-normal-tf32-64",
        {"tensor": ["HMMA.16816.F32.BF16"]},
        "needs HMMA.TF32",
    ),
    "ieee": (
        "cuda-90/paired_linear-normal-ieee-64",
        {"tensor": ["HMMA.1688.F32.TF32"]},
        "needs no tensor cores",
    ),
    "none": ("cuda-100/paired_linear-normal-bf16-64", {"tensor": []}, "needs UTCHMMA, has"),
    "mfma": ("hip-gfx942/paired_linear-normal-bf16-64", {"tensor": []}, "needs 4 v_mfma of bf16"),
    "integers": (
        "cuda-90/int8_paired_linear-64",
        {"tensor": ["HGMMA.64x32x16.F32.BF16"]},
        "needs IGMMA.S8.S8",
    ),
    "few integers": ("cuda-90/int8_matmul-nn-16", {"tensor": []}, "needs IMMA.S8.S8, has []"),
    "integers, sm_80": (
        "cuda-80/int8_paired_conv2d-64x16-lines",
        {"tensor": ["IMMA.16816.U8.U8.SAT"]},
        "needs IMMA.S8.S8",
    ),
    "integers, sm_100": ("cuda-100/int8_matmul-tn-64", {"tensor": []}, "needs UTCIMMA, has []"),
    "integers, gfx942": (
        "hip-gfx942/int8_paired_linear-128",
        {
            "tensor": ["v_mfma_f32_32x32x8_bf16"],
            "opcodes": {"s_endpgm": 1, "v_mfma_f32_32x32x8_bf16": 8},
        },
        "needs 2 v_mfma of i8, has 8 of",
    ),
    "repeated": (
        "cuda-80/int8_paired_linear-64",
        {"repeats": 2.0},
        "products are made 2.0 times, at most 1",
    ),
    "left out": ("cuda-90/int8_paired_linear-64", {"repeats": 0.5}, "made 0.5 times"),
    "loads": ("cuda-90/paired_linear-normal-bf16-64", {"loads_16": 3}, "loads_16 is 3, at least 4"),
    "stores": (
        "cuda-90/perturbed_weights-normal-fp32-flat",
        {"stores_16": 1},
        "stores_16 is 1, at least 2",
    ),
    "integer loads": ("hip-gfx942/int8_range", {"loads_16": 1}, "loads_16 is 1, at least 2"),
    "odd loads": ("cuda-90/int8_paired_linear-64-odd", {"loads_16": 0}, "loads_16 is 0, at least"),
    "lines": ("cuda-90/int8_paired_conv2d-64x16-lines", {"loads_16": 2}, "is 2, at least 4"),
    "integer stores": ("cuda-90/int8_update-nearest", {"stores_16": 0}, "stores_16 is 0"),
    "scalar loads": (
        "cuda-90/perturbed_weights-normal-fp32-flat",
        {"loads": 9},
        "9 loads, at most 8",
    ),
    "fp64": (
        "cuda-90/update-normal-fp32",
        {"opcodes": {"EXIT": 1, "DFMA": 1}},
        "float64 arithmetic: DFMA",
    ),
    "floats": (
        "cuda-90/integer_cross_entropy-10-F12",
        {"opcodes": {"EXIT": 1, "FFMA": 1, "MUFU": 1}},
        "float arithmetic: FFMA",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    name, change, message = BROKEN[rule]
    rows = {f"{row['target']}/{row['name']}": row for row in read()["rows"]}
    assert violations(rows[name]) == []
    (found,) = violations(rows[name] | change)
    assert found.startswith(f"{name}: ") and message in found


# ---- the command


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The command gives committed rows instead of compiling."""
    known = {f"{row['target']}/{row['name']}": row for row in read()["rows"]}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        compiler, "compile_for", lambda config, target: known[f"{target}/{config.name}"]
    )
    return known


def test_a_part_is_printed_and_not_written(
    rows: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (RESULTS / "table.json").read_bytes()
    assert command.main(["--only", "sample-normal$", "--targets", "cuda-90", "cuda-80"]) == 0
    out = capsys.readouterr().out
    assert "cuda-80\n" in out and "| sample-normal | 30 | 0 | 0 | 376 |" in out
    assert "update" not in out and "cuda-100" not in out
    assert (RESULTS / "table.json").read_bytes() == before


def test_a_whole_table_is_written_or_none(
    rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["--out", str(tmp_path / "a")]) == 0
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"table.json", "table.md"}
    assert read(tmp_path / "a")["rows"] == read()["rows"]

    def stop(config: Any, target: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile_for", stop)
    assert command.main(["--out", str(tmp_path / "b")]) == 130
    assert not (tmp_path / "b").exists()


def test_a_broken_rule_is_reported(
    rows: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows["cuda-90/sample-bits"] = rows["cuda-90/sample-bits"] | {"spills": 3}
    assert command.main(["--only", "cuda-90/sample-bits"]) == 1
    assert "broken: cuda-90/sample-bits: spills is 3, at most 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "zzz"], "no configuration of cuda-80, .* has 'zzz'"),
        (["--only", "("], r"only must be a regular expression, got '\('"),
        (["--only", "x", "--out", str(RESULTS)], "out must be another folder for a part"),
    ],
)
def test_wrong_use(
    rows: dict[str, Any], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main([]) == 2
    assert "TRITON_INTERPRET=1 replaces the compiler; run without it" in capsys.readouterr().err
    monkeypatch.setattr(command, "has_triton", lambda: False)
    assert command.main([]) == 2
    assert "compiling needs the triton package" in capsys.readouterr().err


def test_a_kernel_with_other_arguments() -> None:
    config = kernels.sample("normal")
    del config.signature["elements"]
    with pytest.raises(ValueError, match="sample-normal does not fit its kernel in elements"):
        compiler.compile_for(config, "cuda-90")
