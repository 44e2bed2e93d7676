"""The paper's study: its plan, its tuning, what an interruption costs, what it writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.paper import __main__ as command
from experiments.paper import pool
from experiments.paper.cells import WAVES, Cell, needs, source
from experiments.paper.plan import Filter, Plan
from experiments.paper.presets import PRESETS, Preset
from experiments.paper.progress import Meter
from experiments.paper.tuning import candidates, choose
from experiments.train.config import TrainConfig
from experiments.train.resolve import resolve
from tests.experiments.paper.paper_results import study

SMOKE = PRESETS["smoke"]
TINY = replace(
    SMOKE,
    tasks=(replace(SMOKE.tasks[0], epochs=1, batch_size=128, tune_on=256),),
    methods=("full-zo", "full-bp"),
    arithmetics=("fp32",),
)


def plan(preset: Preset, out: Path = Path("runs"), data_dir: Path | None = None) -> Plan:
    return Plan(preset, data_dir, out)


# ---- the plan


def test_every_row_has_its_runs_and_no_run_is_done_twice(tmp_path: Path) -> None:
    preset = replace(PRESETS["cpu"], tasks=PRESETS["cpu"].tasks[:1], candidates=3)
    found = plan(preset, data_dir=tmp_path)
    grid = [c for c in found.cells if c.section == "grid"]
    assert len(grid) == 3 * (6 + 6 + 3)  # seeds; fp32, int8, and int8 with the other loss
    assert {c.method for c in grid if c.arithmetic == "int8-float"} == {"full-zo", "cls2", "cls1"}
    assert len([c for c in found.cells if c.section == "finetune"]) == 2 * len(grid)
    tuning = [c for c in found.cells if c.section == "tuning"]
    assert len(tuning) == 1 * 3 * (6 + 6)  # seeds, settings, methods: the same for every method
    assert not {c.seed for c in tuning} & {c.seed for c in grid}
    results = {c: {"test_accuracy": 50.0} for c in found.cells}
    folders = [found.config(c, results).out for c in found.cells]
    assert len(set(folders)) == len(folders) == len(set(found.cells))


def test_what_a_run_needs_comes_in_an_earlier_wave() -> None:
    found = plan(SMOKE)
    waves = found.waves()
    assert sum(map(len, waves)) == len(found.cells)
    place = {cell: i for i, wave in enumerate(waves) for cell in wave}
    for cell in found.cells:
        assert all(place[other] < place[cell] for other in needs(cell, found.cells))
    assert len(WAVES) == len(waves)


def test_a_section_takes_along_what_it_needs() -> None:
    found = plan(SMOKE)
    grid = [c for wave in found.waves(Filter(sections=("grid",))) for c in wave]
    assert {c.section for c in grid} == {"tuning", "grid", "pretraining"}
    tuned = [c for wave in found.waves(Filter(sections=("finetune",))) for c in wave]
    assert {c.method for c in tuned if c.section in ("grid", "tuning")} == {"full-bp"}


def test_a_set_alone_has_all_that_it_needs() -> None:
    found = Plan(PRESETS["cpu"], Path("data"), Path("runs"))
    cells = [c for wave in found.waves(Filter(sets=("fashion-mnist",))) for c in wave]
    assert set(cells) == {c for c in found.cells if c.data == "fashion-mnist"}
    fine = [c for wave in found.waves(Filter(("finetune",), ("mnist",))) for c in wave]
    assert {c.data for c in fine} == {"mnist"}
    assert all(other in fine for c in fine for other in needs(c, found.cells))
    floats = Filter(("finetune",), arithmetics=("fp32",))
    assert {c.arithmetic for wave in found.waves(floats) for c in wave} == {"fp32"}


def test_heads_that_learn_from_every_sample() -> None:
    """Each way of a method is tuned as a row of its own, as often as the controls beside it."""
    found = Plan(PRESETS["samples"], Path("data"), Path("runs"))
    cells = [c for c in found.cells if c.data == "mnist"]
    ways = {
        *("full-bp", "local", "frozen-cls2", "frozen-cls1"),
        *("cls2 by feedback", "cls2 by feedback-zero", "cls2 by feedback-random", "cls2 by auto"),
        *("cls2 by feedback-exact", "cls2 by feedback-exact-zero"),
        *("cls1 by feedback-exact", "cls1 by feedback-exact-zero"),
        *("cls1 by feedback", "cls1 by auto", "full-zo by feedback", "full-zo by auto"),
    }
    for section, runs in (("tuning", 3), ("grid", 3)):
        assert Counter(c.way for c in cells if c.section == section) == dict.fromkeys(ways, runs)
    # Weights of its own classifiers: no trained network has them.
    assert {c.way for c in cells if c.section == "finetune"} == ways - {"local"}
    config = found.base(next(c for c in cells if c.way == "cls1 by feedback"))
    assert (config.method, config.directions) == ("cls1", "feedback")
    assert found.base(next(c for c in cells if c.way == "full-bp")).directions == "weight"

    def chosen(**given: Any) -> set[str]:
        waves = found.waves(Filter(("grid",), ("mnist",), **given))
        return {c.way for wave in waves for c in wave}

    assert chosen(methods=["cls2"], directions=["auto"]) == {"cls2 by auto"}
    assert chosen(directions=["weight"]) == {"full-bp", "local", "frozen-cls2", "frozen-cls1"}


def test_clouds_have_no_fine_tuning() -> None:
    found = Plan(PRESETS["cpu"], Path("data"), Path("runs"))
    clouds = [c for c in found.cells if c.data == "modelnet10"]
    assert {c.section for c in clouds} == {"tuning", "grid"}
    config = found.base(clouds[0])
    assert (config.model, config.points, config.rotate) == ("pointnet", 128, None)
    assert Plan(replace(PRESETS["gpu"], device="cpu"), Path("data"), Path("runs")).cells
    with pytest.raises(ValueError, match=r"rotations belong to images, got \(30.0,\)"):
        replace(PRESETS["cpu"].task("modelnet10"), rotations=(30.0,))


def test_fine_tuning_starts_from_the_same_seed_and_precision() -> None:
    cell = Cell("finetune", "digits", "lenet5", "int8-float", "cls2", 2, rotate=30.0)
    assert source(cell) == Cell("grid", "digits", "lenet5", "int8", "full-bp", 2)
    trial = replace(cell, section="finetune-tuning", arithmetic="fp32", candidate="x")
    assert source(trial) == Cell("pretraining", "digits", "lenet5", "fp32", "full-bp", 2)


def test_tuning_never_sees_the_test_set() -> None:
    found = plan(SMOKE)
    for cell in found.cells:
        config = found.base(cell)
        tunes = cell.section in ("tuning", "pretraining", "finetune-tuning")
        assert (config.hold_out > 0) == tunes


# ---- tuning


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", ["full-zo", "frozen-cls2", "cls2", "full-bp"])
@pytest.mark.parametrize("fine", [False, True])
def test_every_method_has_as_many_settings_and_its_recipe_is_one(
    precision: Any, method: Any, fine: bool
) -> None:
    config = resolve(TrainConfig(method=method, precision=precision, device="cpu"))
    table = candidates(config, fine, 5)
    assert len(table) == 5
    changed = [replace(config, **changes) for changes in table.values()]
    assert len({str(resolve(c)) for c in changed}) == 5
    assert resolve(changed[0]) == config


def test_the_first_of_the_best_is_chosen() -> None:
    assert choose({"a": [90.0, 92.0], "b": [95.0, 88.0], "c": [91.0, 91.0]}) == "b"
    assert choose({"a": [90.0, 92.0], "c": [91.0, 91.0]}) == "a"


def test_nothing_is_chosen_before_all_settings_ran() -> None:
    part = study(ran=lambda cell: cell.section == "tuning" and cell.candidate == "recipe")
    assert all(record["chosen"] is None for record in part["tuning"])
    assert any(record["tried"][0]["accuracies"] for record in part["tuning"])
    whole = study(ran=lambda cell: cell.candidate is not None)
    assert {record["chosen"] for record in whole["tuning"]} == {"recipe"}


def test_the_grid_takes_the_chosen_setting() -> None:
    found = plan(TINY)
    cell = next(c for c in found.cells if c.section == "grid" and c.method == "full-zo")
    lr = found.base(cell).head_lr
    assert lr is not None
    trials = needs(cell, found.cells)
    results = {c: {"test_accuracy": 10.0 + i} for i, c in enumerate(trials)}
    assert found.config(cell, results).head_lr == lr / 2
    worse = {c: {"test_accuracy": 10.0 - i} for i, c in enumerate(trials)}
    found = plan(TINY)
    assert found.config(cell, worse).head_lr == lr


# ---- the command


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--preset", "smoke", "--out", str(folder / "runs"), "--results", str(folder), *more]


def finished(folder: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("runs/*/*/result.json")}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "smoke", TINY)  # type: ignore[misc]


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = pool.train

    def interrupts(config: TrainConfig, *rest: Any) -> dict[str, Any]:
        if config.method == "full-bp" and not config.hold_out:
            os.kill(os.getpid(), signal.SIGINT)
        return train(config, *rest)

    monkeypatch.setattr(pool, "train", interrupts)
    assert command.main(arguments(tmp_path)) == 130
    out = capsys.readouterr().out
    assert "the same command goes on" in out
    before = finished(tmp_path)
    part = json.loads((tmp_path / "paper_smoke.json").read_text())
    assert len(part["runs"]) == len(before) > 0
    total = len(plan(TINY).cells)
    assert len(part["missing"]) == total - len(before)
    assert {m["why"] for m in part["missing"]} == {"not run"}

    monkeypatch.setattr(pool, "train", train)
    assert command.main(arguments(tmp_path)) == 0
    after = finished(tmp_path)
    assert len(after) == total and before.items() <= after.items()
    text = (tmp_path / "paper_smoke.json").read_text()
    whole = json.loads(text)
    assert whole["missing"] == [] and len(whole["runs"]) == total
    assert str(tmp_path) not in text
    fine = [r for r in whole["runs"] if r["section"] == "finetune"]
    upright = next(r for r in whole["runs"] if r["section"] == "grid" and r["method"] == "full-bp")
    assert len({r["start_accuracy"] for r in fine}) == 1  # one network, the same rotated test set
    assert fine[0]["start_accuracy"] != upright["test_accuracy"]
    assert len([s for s in whole["settings"] if s["section"] == "grid"]) == 2
    for record in whole["tuning"]:
        assert [len(t["accuracies"]) for t in record["tried"]] == [1, 1]
        assert record["chosen"] in {t["name"] for t in record["tried"]}


def test_processes_beside_each_other_stop_and_go_on(tmp_path: Path) -> None:
    found = plan(TINY, tmp_path)
    tuning = [c for c in found.cells if c.section == "tuning"]
    configs = {c: found.config(c, {}) for c in tuning}
    ticks: list[tuple[Cell, int]] = []
    beside = pool.Pool(2, "command", lambda *tick: ticks.append(tick))
    first: dict[Cell, Any] = {}
    with pytest.raises(pool.Stopped):
        for cell, (kind, result) in beside.run(configs):
            assert kind == "done"
            first[cell] = result
            os.kill(os.getpid(), signal.SIGINT)  # caught: the runs that go on are stopped
    assert first and {cell for cell, _ in ticks} <= set(tuning)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/result.json")}
    again = dict(pool.Pool(1, "command", lambda *tick: None).run(configs))
    assert {cell: again[cell] for cell in first} == {c: ("done", r) for c, r in first.items()}
    assert len(again) == len(tuning)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


@pytest.mark.usefixtures("tiny")
def test_a_killed_process_ends_the_study_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(self: Meter, cell: Cell, step: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(Meter, "tick", killed)
    assert command.main(arguments(tmp_path, "--processes", "2", "--only", "tuning")) == 1
    assert "error: a run's process was killed" in capsys.readouterr().err
    assert (tmp_path / "paper_smoke.json").exists()


@pytest.mark.usefixtures("tiny")
def test_a_failed_run_costs_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = pool.train

    def fails(config: TrainConfig, *rest: Any) -> dict[str, Any]:
        if config.method == "full-zo" and config.hold_out:
            raise RuntimeError("out of memory")
        return train(config, *rest)

    monkeypatch.setattr(pool, "train", fails)
    assert command.main(arguments(tmp_path, "--only", "grid")) == 1
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    written = json.loads((tmp_path / "paper_smoke.json").read_text())
    why = {
        m["why"] for m in written["missing"] if m["section"] == "grid" and m["method"] == "full-zo"
    }
    assert len(why) == 1 and why.pop().startswith("needs tuning digits fp32 full-zo seed 100")
    assert [r["method"] for r in written["runs"] if r["section"] == "grid"] == ["full-bp"]


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments(tmp_path, "--processes", "0")) == 2
    assert "processes must be at least 1, got 0" in capsys.readouterr().err
    assert command.main(arguments(tmp_path, "--sets", "mnist")) == 2
    expected = "sets of preset smoke must be of digits, got 'mnist'"
    assert expected in capsys.readouterr().err
    cpu = ["--preset", "cpu", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert command.main(cpu) == 2
    assert "data_dir must name their folder" in capsys.readouterr().err
    assert command.main([*cpu, "--data-dir", str(tmp_path)]) == 2
    assert "train-images-idx3-ubyte[.gz] is neither in" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
