"""The columns: one file a family of ops in each, the same names, the same arguments."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

import zo_kernels

pytest.importorskip("numba")
PACKAGE = Path(zo_kernels.__file__).parent
OPS = sorted(
    {*zo_kernels.__all__} - {"BACKENDS", "RULES", "Rule", "apply_rule_", "resolve_backend"}
)
# One dimension is the convolution of images of height 1, on every backend.
COMPOSED = {"paired_conv1d", "int8_paired_conv1d"}
# What the files of a column share, besides one another.
SHARED = {
    "ops": {"checks"},
    "triton": {"integer", "norms", "philox", "plan", "rules", "shim", "table", "tile"},
    "reference": {"integer", "rules"},
    "cpu": {
        *("compiled", "kernels", "memory", "rules", "sweeps"),
        *("int8_correlate", "int8_dot", "int8_kernels", "int8_pack", "int8_products"),
        "int8_unpool",
    },
}


def file_of(name: str) -> str:
    return str(getattr(zo_kernels, name).__module__.rpartition(".")[2])


@pytest.mark.parametrize("column", ["triton", "cpu", "reference"])
def test_columns_have_the_same_files(column: str) -> None:
    files = {path.stem for path in (PACKAGE / column).glob("*.py")} - {"__init__"}
    assert files - SHARED[column] == {file_of(name) for name in OPS}
    assert SHARED[column] <= files


@pytest.mark.parametrize("name", OPS)
def test_columns_have_the_arguments_of_the_op(name: str) -> None:
    public = inspect.signature(getattr(zo_kernels, name))
    doc = inspect.getdoc(getattr(zo_kernels, name)) or ""
    assert not [parameter for parameter in public.parameters if parameter not in doc]
    assert public.parameters["backend"].default == "auto"
    if name in COMPOSED:
        return
    arguments = [(p.name, p.kind, p.default) for p in public.parameters.values()]
    for column in ("triton", "cpu", "reference"):
        twin = getattr(import_module(f"zo_kernels.{column}.{file_of(name)}"), name)
        found = [(p.name, p.kind, p.default) for p in inspect.signature(twin).parameters.values()]
        assert found == [a for a in arguments if a[0] != "backend"], column
    assert getattr(import_module("zo_kernels.reference"), name) is twin
    schema = getattr(torch.ops.zo_kernels, name).default._schema
    assert [a.name for a in schema.arguments] == [*public.parameters]
    assert schema.is_mutable is name.endswith("_")


def test_files_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name
