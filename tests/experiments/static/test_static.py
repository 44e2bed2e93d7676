"""The static table: it is that of the code, it breaks no rule, and compiling gives it again.

One process compiles the subset (Triton's interpreter, which the other tests use, replaces the
compiler in a process). Under xdist, `--dist loadfile` keeps this file on one worker.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("tyro")

from experiments.static.registry import TARGETS, configs
from experiments.static.roofline import predict
from experiments.static.rules import KNOWN, SHARED, key, violations
from experiments.static.sources import digest
from experiments.static.table import COMMAND, MARKDOWN, RESULTS, as_json, as_markdown, read
from experiments.train.environment import versions

ROOT = Path(__file__).parents[3]
EACH = (
    "perturbed_weights-normal-fp32-flat",
    "perturbed_weights-normal-bf16-general",
    "perturbed_weights-rademacher-bf16-flat",
    "update-normal-bf16",
    "update-rademacher-fp32",
    "stage-normal-fp32-bf16-flat-pending",
)
SUBSET = {
    "cuda-80": (
        *EACH,
        "paired_linear-rademacher-bf16-128",
        "paired_linear-normal-tf32x3-64",
        "int8_paired_linear-64",
    ),
    "cuda-90": (
        *EACH,
        "perturbed_weights-rademacher-fp32-general",
        "perturbed_weights-normal-fp64-bf16-flat",
        "perturbed_weights-normal-fp32-general-int64",
        "update-normal-fp32",
        "update-normal-fp64-int64",
        "stage-rademacher-bf16-flat",
        "stage-normal-fp32-general-pending",
        "sample-normal",
        "sample-rademacher",
        "sample-sparse_int8",
        "sample-bits",
        "paired_linear-normal-bf16-16",
        "paired_linear-rademacher-bf16-256",
        "paired_linear-rademacher-mixed-64-shared",
        "paired_linear-normal-tf32-64-int64",
        "paired_linear-normal-ieee-64",
        "paired_linear-normal-tf32x3-64",
        "paired_conv2d-rademacher-bf16-128x64-lines",
        "paired_conv2d-normal-ieee-64x16-gathered-pool",
        "paired_layer_norm-bf16-4096x4096",
        "paired_cross_entropy_forward-bf16-fp64-sum-1024x1000",
        "int8_requantize-nearest-flat",
        "int8_paired_linear-128",
        "int8_paired_conv2d-64x16-gathered-pool",
    ),
    "cuda-100": (
        *EACH,
        "paired_linear-rademacher-bf16-256",
        "paired_linear-normal-bf16-16",
        "paired_linear-normal-tf32x3-64",
        "int8_matmul-nn-16",
        "int8_paired_conv2d-128x64-lines",
    ),
    "hip-gfx942": (
        *EACH,
        "paired_linear-rademacher-bf16-256",
        "paired_linear-normal-ieee-16",
        "paired_linear-normal-mixed-128",
        "int8_paired_linear-64",
    ),
}
# Static instructions on sm_90 at the most; a thread of the first six serves 8 elements.
COSTS = {
    "sample-normal": 450,  # measured with Triton 3.9: 376 to make and store 8 normals
    "sample-sparse_int8": 320,  # 248 for 8 integers
    "sample-rademacher": 250,  # 176 for 8 signs, of which Philox is the most
    "perturbed_weights-normal-fp32-flat": 530,  # 448 for 8 weights
    "perturbed_weights-rademacher-bf16-flat": 330,  # 248 for 8 weights
    "stage-normal-fp32-bf16-flat-pending": 1150,  # 1048 for 8 weights, of which two normals each
    "paired_linear-normal-bf16-16": 1700,  # 1520 for 16 normals a turn, 870 of them in the loop
    "paired_linear-rademacher-bf16-256": 1850,  # 1632 for 8 signs a turn, 272 in the loop
    "int8_requantize-nearest-flat": 400,  # 328 for 16 accumulators
    "int8_paired_linear-128": 1950,  # 1744 for 32 integers a turn, 830 in the loop
}
NO_MORE = ("registers", "spills", "scalar_spills", "local", "shared", "loop_instructions")


@cache
def committed() -> dict[str, dict[str, Any]]:
    return {key(row): row for row in read()["rows"]}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The subset, compiled by the command."""
    names = "|".join(f"{target}/{name}" for target, names in SUBSET.items() for name in names)
    folder = tmp_path_factory.mktemp("static")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*(sys.executable, "-m", "experiments.static"), f"--only=^({names})$", f"--out={folder}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {key(row): row for row in read(folder)["rows"]}


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_is_that_of_the_code(target: str) -> None:
    """Neither a stale row, nor one that is missing or no longer shipped."""
    now = {f"{target}/{config.name}": digest(config) for config in configs(target)}
    then = {name: row["hash"] for name, row in committed().items() if row["target"] == target}
    differ = sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
    assert not differ, f"run: {COMMAND} ({', '.join(differ)})"


def test_files_are_what_the_rows_give() -> None:
    content = read()
    assert (RESULTS / "table.json").read_text() == as_json(content)
    assert (RESULTS / MARKDOWN).read_text() == as_markdown(content)
    for row in content["rows"]:
        if row["target"] == "cuda-90":
            assert row["h200"] == predict(
                row["problem"], row["warps"], row["outside"], row["loop"]
            ), f"run: {COMMAND}"


@pytest.mark.parametrize("target", TARGETS)
def test_no_committed_row_breaks_a_rule(target: str) -> None:
    rows = [row for row in committed().values() if row["target"] == target]
    assert len(rows) >= 5
    assert not [found for row in rows for found in violations(row)]


def test_what_is_known_to_break_a_limit_still_does() -> None:
    """An exception that is no longer needed, or has changed, must be written anew."""
    for name, (values, _) in KNOWN.items():
        row = committed()[name]
        assert {field: row[field] for field in values} == values, name
        shared = SHARED[row["target"]]
        for field, value in values.items():
            assert value > {"shared": shared, "repeats": 1}.get(field, 0), name


def test_the_subset_is_small_and_shipped() -> None:
    names = {f"{target}/{name}" for target, names in SUBSET.items() for name in names}
    assert len(names) <= 60
    assert names <= {*committed()}
    assert {f"cuda-90/{name}" for name in COSTS} <= names


def test_the_subset_compiles_and_breaks_no_rule(fresh: dict[str, dict[str, Any]]) -> None:
    assert len(fresh) == sum(map(len, SUBSET.values()))
    assert not [found for row in fresh.values() for found in violations(row)]


def test_no_row_of_the_subset_is_worse(fresh: dict[str, dict[str, Any]]) -> None:
    """Than the committed one, where the compiler is the same."""
    if read()["versions"]["triton"] != versions()["triton"]:
        pytest.skip(f"the table is of Triton {read()['versions']['triton']}")
    for name, row in fresh.items():
        old = committed()[name]
        worse = [k for k in NO_MORE if k in old and row[k] > old[k]]
        assert not worse, (name, {k: (old[k], row[k]) for k in worse})
        assert (row["tensor"], row["repeats"]) == (old["tensor"], old["repeats"]), name


@pytest.mark.parametrize("source", ["committed", "fresh"])
def test_costs(source: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue("fresh") if source == "fresh" else committed()
    for name, most in COSTS.items():
        assert rows[f"cuda-90/{name}"]["instructions"] <= most, name


def test_costs_of_noise_in_a_product_are_as_stated() -> None:
    """zo_kernels/ops/linear.py: bf16, 54-66 instructions of the loop a normal, 19-34 a sign."""
    text = (ROOT / "zo_kernels" / "ops" / "linear.py").read_text()
    for noise, words in (("normal", "for a normal"), ("rademacher", "for a sign")):
        stated = re.search(rf"(\d+)-(\d+)[^-]*?{words}", " ".join(text.split()))
        assert stated is not None
        found = [
            row["noise_instructions"]
            for name, row in committed().items()
            if re.fullmatch(rf"cuda-90/paired_linear-{noise}-bf16-\d+", name)
        ]
        assert (round(min(found)), round(max(found))) == tuple(map(int, stated.groups()))
