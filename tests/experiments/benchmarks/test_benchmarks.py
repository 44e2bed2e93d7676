"""The benchmarks: their reduced form from end to end, what they refuse, and how they time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import zo_kernels
from elasticzo import directions
from elasticzo.models import VGG11
from experiments import timing
from experiments.benchmarks import __main__ as command
from experiments.benchmarks import contestants, kernels, memory_peak, paths_map, step
from experiments.benchmarks.cases import Case
from experiments.benchmarks.models import MeZOLoop, mlp, subjects
from experiments.benchmarks.section import Bench, Refused, relative_error, require

ROOT = Path(__file__).parents[3]
SECTIONS = ("step", "kernels", "paths", "memory", "precision")
CPU = torch.device("cpu")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one command, in a process that does not know of the interpreter."""
    folder = tmp_path_factory.mktemp("benchmarks")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks", "--reduced", "--out", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in SECTIONS}
    return SimpleNamespace(folder=folder, results=results, out=done.stdout)


@pytest.mark.slow
def test_reduced_writes_every_file_and_says_what_it_is(whole: Any) -> None:
    names = {f"{name}.{kind}" for name in SECTIONS for kind in ("json", "png")}
    assert {path.name for path in whole.folder.iterdir()} == names
    assert "these times are no measurements" in whole.out
    for name, result in whole.results.items():
        assert result["reduced"] is True and result["section"] == name
        assert result["refused"] == result["failed"] == []
        assert result["versions"]["torch"] == torch.__version__
        assert result["device"]["name"] and result["seconds"] > 0
        assert result["command"].startswith("python -m experiments.benchmarks --reduced")
        assert {"commit", "settings", "meaning"} <= {*result} and result["rows"]


@pytest.mark.slow
def test_reduced_times_every_form_of_the_step(whole: Any) -> None:
    rows = whole.results["step"]["rows"]
    assert {row["model"] for row in rows} == {"lenet5", "mlp", "vgg", "residual"}
    assert {row["dtype"] for row in rows} == {"fp32", "bf16"}
    assert {row["noise"] for row in rows} == {"normal", "rademacher"}
    assert {row["tail"] for row in rows} == {0, 1} and {row["defer"] for row in rows} == {
        True,
        False,
    }
    for row in rows:
        assert {"two_passes", "one_double", "two_passes_again", "step_captured"} <= {*row["times"]}
        assert row["inference"] in ("two_passes", "one_double")
        passes, step_time = (
            row["times"][row["inference"]]["us"],
            row["times"]["step_captured"]["us"],
        )
        assert row["ratio_step_captured"]["median"] == pytest.approx(passes / step_time)
        assert row["verified"]["weights"] >= 0 and row["spread"]["median"] > 0
        assert ("speedup_over_mezo_eager" in row) == row["mezo"]


@pytest.mark.slow
def test_reduced_covers_every_kernel(whole: Any) -> None:
    result = whole.results["kernels"]
    assert {row["kernel"] for row in result["rows"]} == {
        *("perturbed_weights", "stage_", "update_", "paired_linear", "paired_conv2d"),
        *("paired_layer_norm", "paired_batch_norm"),
        *("paired_cross_entropy", "paired_cross_entropy_backward"),
    }
    assert {"memory", "bf16", "tf32", "fp32", "issue"} <= {*result["peaks"]}
    for row in result["rows"]:
        parts = {unit: row[f"{unit}_us"] for unit in ("memory", "products", "noise")}
        assert row["floor_us"] == max(parts.values()) == parts[row["bound"]]
        assert row["fraction"] == pytest.approx(row["floor_us"] / row["time"]["us"])
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["time"]["us"] / 1e3)


@pytest.mark.slow
def test_reduced_paths_memory_and_precision(whole: Any) -> None:
    paths = whole.results["paths"]
    for row in paths["rows"]:
        times = {"fused": row["fused_us"], "staged": row["staged_us"]}
        assert row["best"] == min(times, key=lambda path: times[path])
        assert row["regret"] == pytest.approx(times[row["choice"]] / min(times.values()))
    assert paths["summary"]["cells"] == len(paths["rows"])
    memory = whole.results["memory"]["rows"]
    assert memory[0]["method"] == "inference" and memory[0]["bytes"] > 0
    for row in memory[1:]:
        measured = row["path"] == "auto" or torch.cuda.is_available()
        assert (row["over_inference"] is not None) == measured
    errors = {(r["compute"], r["eps"]): r["error"] for r in whole.results["precision"]["rows"]}
    for eps in (1e-3, 1e-2, 1e-1):
        assert errors["ieee", eps] < errors["tf32", eps] < errors["bf16", eps] < 0.3
        assert errors["tf32x3", eps] < errors["tf32", eps] / 10


# ---- the command


def test_an_interrupted_section_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_peak, "peak", stop)
    given = ["--reduced", "--only", "paths", "memory", "--out", str(tmp_path)]
    assert command.main(given) == command.STOPPED
    assert {path.name for path in tmp_path.iterdir()} == {"paths.json", "paths.png"}
    assert "sections that were written stay" in capsys.readouterr().err
    assert command.main([*given, "--replot"]) == 0


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_a_wrong_kernel_is_not_timed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = zo_kernels.paired_linear

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(*args, **kwargs)
        if fault == "wrong":
            return y * 1.05
        y[-1, -1] = torch.empty((), dtype=y.dtype)  # as memory comes while verifying
        return y

    monkeypatch.setattr(zo_kernels, "paired_linear", wrong)
    given = ["--reduced", "--only", "paths", "--out", str(tmp_path)]
    assert command.main(given) == command.WRONG
    error = capsys.readouterr().err
    assert "refused, not timed: paths linear" in error
    result = json.loads((tmp_path / "paths.json").read_text())
    linear = [row for row in result["rows"] if row["layer"] == "linear"]
    assert linear and all("refused" in row and "fused_us" not in row for row in linear)
    assert len(result["refused"]) == len(linear) and result["failed"] == []
    assert "fused_us" in result["rows"][-1]  # the others go on


def test_a_part_compiles_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, timed = [], []
    time_cell = paths_map.time_cell

    def noted(*args: Any) -> Any:
        begun.append(args[-1])
        timed.append(time_cell(*args))
        return timed[-1]

    monkeypatch.setattr(paths_map, "time_cell", noted)
    given = ["--reduced", "--only", "paths", "--out", str(tmp_path / "none")]
    assert command.main([*given, "--part", "1/3"]) == 0
    assert (
        len(begun) == 1 and not timed and not (tmp_path / "none").exists()
    )  # one call of each, and no time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "benchmarks need a CUDA device, and torch finds none", marks=no_cuda),
        (["--reduced", "--out", str(command.RESULTS)], "out must be another folder"),
        (["--reduced", "--part", "3/2"], "part must be i/n with 0 <= i < n, got '3/2'"),
        (["--reduced", "--budget-minutes", "0"], "budget_minutes must be > 0, got 0.0"),
        (["--reduced", "--batches", "0"], r"batches must be >= 1, got \(0,\)"),
        (["--replot", "--out", "/nowhere"], "no result of step, .* in /nowhere"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == command.USAGE_ERROR
    assert re.search(message, capsys.readouterr().err)


def test_no_gpu_results_without_a_gpu() -> None:
    for path in command.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["reduced"] is False


# ---- sections


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cuda", 0) if torch.cuda.is_available() else CPU, reduced=True)


def test_cases_are_skipped_refused_or_fail(bench: Bench) -> None:
    def raises(error: Exception) -> Callable[[], Any]:
        def run() -> Any:
            raise error

        return run

    assert "out of memory" in bench.case("a", raises(torch.OutOfMemoryError("CUDA")))["skipped"]
    assert "no memory" in bench.case("b", raises(Refused("no memory")))["refused"]
    assert bench.case("c", raises(RuntimeError("odd")))["failed"] == "RuntimeError: odd"
    assert (bench.refused, bench.failed) == (["b: no memory"], ["c: RuntimeError: odd"])
    bench.deadline = time.monotonic() - 1
    assert bench.case("d", dict) == {"skipped": "the time budget was used up"}


def test_nan_is_never_within_a_bound() -> None:
    exact = torch.ones(3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), exact) == float("inf")
    with pytest.raises(Refused, match=r"x: the relative error 0.1 exceeds 0.01"):
        require("x", 1.1 * exact, exact, 0.01)


def _contest(bench: Bench) -> Any:
    variant = step.Variant(0, "rademacher")
    return step.contest(bench, subjects(True)["mlp"], 1, "fp32", variant)


@pytest.mark.parametrize("fault", ["noise", "update", "plain"])
def test_a_wrong_step_is_refused(fault: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    message = {"noise": "logits of half 0", "update": "after the step", "plain": "two passes"}
    if fault == "noise":
        draw = contestants.reference.sample
        monkeypatch.setattr(
            contestants.reference, "sample", lambda *args, **kwargs: -draw(*args, **kwargs)
        )
    elif fault == "update":
        monkeypatch.setattr(directions, "update_", lambda *args, **kwargs: None)
    else:
        passes = contestants.Plain._two
        monkeypatch.setattr(
            contestants.Plain, "_two", lambda self: tuple(1.1 * y for y in passes(self))
        )
    with pytest.raises(Refused, match=message[fault]):
        _contest(bench)


@pytest.mark.parametrize("captured", [False, True])
def test_the_mezo_style_loop_walks_back_and_learns(captured: bool) -> None:
    x, y = torch.randn(8, 6), torch.randint(6, (8,))
    still = MeZOLoop(mlp(6, 2), eps=1e-2, lr=0.0, captured=captured)
    before = [p.clone() for p in still.params]
    for _ in range(3):  # four generators stay in step
        still.step(x, y)
    for p, old in zip(still.params, before, strict=True):
        torch.testing.assert_close(p, old, rtol=0, atol=1e-6)
    moving = MeZOLoop(mlp(6, 2), eps=1e-3, lr=1e-2, captured=captured)
    first = float(moving.step(x, y))
    for _ in range(100):
        last = float(moving.step(x, y))
    assert last < first


def test_floor_by_hand() -> None:
    rates = {"memory": 1e9, "bf16": 1e12, "issue": 1e10}
    case = Case("k", "c", list, list, lambda given: 0.0, bytes=2000, flops=3e6, kind="bf16")
    found = kernels.floor_of(case, rates)
    assert found["bound"] == "products" and found["floor_us"] == pytest.approx(3.0)
    assert found["memory_us"] == pytest.approx(2.0) and found["noise_us"] == 0
    case.elements, case.instructions = 1000, 50
    assert kernels.floor_of(case, rates)["bound"] == "noise"


# ---- timing


def test_timings_by_hand() -> None:
    assert timing.percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    found = timing.Timings({"a": [1e-6, 2e-6, 3e-6], "b": [2e-6, 2e-6, 12e-6]})
    assert found.row("a") == pytest.approx({"us": 2, "us_20": 1.4, "us_80": 2.6, "rounds": 3})
    assert found.ratio("b", "a")["median"] == pytest.approx(2.0)  # of 2, 1 and 4
    assert found.faster("a", "b") == "a"


def test_contestants_take_turns_on_inputs_that_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REGION", 0.0)  # one call a region
    calls: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    found = timing.measure(runs, CPU, seconds=0.0, rounds=(4, 9))
    assert all(len(times) == 4 for times in found.seconds.values())
    assert [name for name, _ in calls[4:]] == ["a", "b", "b", "a"] * 2
    assert [i for name, i in calls if name == "a"] == [0, 1, 2, 3, 4, 5]


def test_device_clock_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA, in which order, on a device that only notes it."""
    log: list[str] = []

    class Noted:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> None:
            log.append("capture")

        def __exit__(self, *error: Any) -> None:
            log.append("captured")

        def __getattr__(self, name: str) -> Callable[..., float]:
            return lambda *args: log.append(name) or 2.0  # type: ignore[func-returns-value]

    for name in ("Event", "CUDAGraph", "Stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Noted)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Noted())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    device: Any = SimpleNamespace(type="cuda")
    graphed = timing.Graphed(lambda: log.append("run"), device)
    assert log.count("run") == 3 and log[-3:] == ["capture", "run", "captured"]
    log.clear()
    found = timing.measure({"g": graphed}, device, seconds=0.0, rounds=(3, 3))
    region = ["idle", "record", *["replay"] * 2, "record", "synchronize", "elapsed_time"]
    assert log[-len(region) :] == region  # 2 ms a region: two calls make REGION
    assert found.median("g") == pytest.approx(1e-3)


def test_sets_defeat_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 << 20)
    device: Any = SimpleNamespace(type="cuda")
    assert timing.sets_for(40 << 20, device) == 5
    assert timing.sets_for(1, device) == timing.MAX_SETS
    assert timing.sets_for(1 << 40, device) == 2


# ---- the network


def test_vgg11() -> None:
    net = VGG11()
    assert sum(p.numel() for p in net.parameters()) == 9_225_610
    assert VGG11(classes=7, channels=1, width=2)(torch.randn(3, 1, 32, 32)).shape == (3, 7)
