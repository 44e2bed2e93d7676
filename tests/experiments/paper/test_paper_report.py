"""The study's page and tables: what they say of made-up results, and of what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from experiments.files import write_json
from experiments.paper.cells import Cell
from experiments.paper.compare import Runs, Scene, accuracy_text, gain_text, mean_of
from experiments.paper.floors import Floor, floors, memory_floors
from experiments.paper.report import __main__ as command
from experiments.paper.report import measured
from experiments.paper.report.blocks import Cell as Marked
from experiments.paper.report.blocks import Table, made_by
from experiments.paper.report.claims import claims
from experiments.paper.report.generic import generic_tables
from experiments.paper.report.others import SOURCES
from experiments.paper.report.pictures import dots
from experiments.paper.report.study import accuracy_table, gain_table, integer_table
from tests.experiments.paper.paper_results import SMALL, made_up, study

DIGITS = Scene("digits", "lenet5")
TURNED = Scene("digits", "lenet5", 30.0)


def rows(table: Table) -> dict[str, list[str]]:
    """Cells by the name of their row."""
    text = [[c.text if isinstance(c, Marked) else c for c in row] for row in table.rows]
    return {row[0]: row[1:] for row in text}


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(study(), "cpu")


# ---- figures


def test_means_and_spreads() -> None:
    found = mean_of([1.0, 2.0, 6.0])
    assert found is not None and (found.mean, found.n) == (3.0, 3)
    assert found.sd == pytest.approx(7.0**0.5) and found.error == pytest.approx((7.0 / 3) ** 0.5)
    assert (accuracy_text(found, 3), gain_text(found, 3)) == ("3.00 ± 2.65", "+3.00 ± 1.53")
    assert gain_text(mean_of([-1.0]), 3) == "-1.00 (1)"
    assert accuracy_text(mean_of([]), 3) == "not run"


def test_accuracies_and_gains_of_the_tables(runs: Runs) -> None:
    table = rows(accuracy_table(runs, DIGITS))
    # fp32, int8 and int8 with the float loss: 0.5 and 0.25 points less; seeds 0, 0.1, 0.2 of Cls1
    assert table["ZO-Feat-Cls1"] == ["96.10 ± 0.10", "95.60 ± 0.10", "95.85 ± 0.10"]
    assert table["Full BP"] == ["99.00 ± 0.00", "98.50 ± 0.00", "98.50 ± 0.00"]  # one run
    assert "no fine-tuning" not in table
    gain = rows(gain_table(runs, DIGITS))
    assert gain["Cls1 over Full ZO"] == ["+18.10 ± 0.06"] * 3
    assert gain["Cls1 over its control"] == ["+1.10 ± 0.06", "+1.10 ± 0.06", "+1.35 ± 0.06"]
    assert gain["Cls2 over its control"] == ["+5.00 ± 0.00", "+5.00 ± 0.00", "+5.25 ± 0.00"]


def test_differences_are_taken_seed_by_seed() -> None:
    def shifted(cell: Cell) -> float:
        return 50.0 + 10 * cell.seed + (1.0 if cell.method == "cls2" else 0.0)

    runs = Runs(study(accuracy=shifted), "cpu")
    gain = runs.gain(DIGITS, "fp32", "cls2", "full-zo")
    assert gain is not None and (gain.mean, gain.sd) == (1.0, 0.0)
    spread = runs.mean(DIGITS, "fp32", "cls2")
    assert spread is not None and spread.sd == 10.0


def test_fine_tuning_has_the_accuracy_before_it(runs: Runs) -> None:
    assert rows(accuracy_table(runs, TURNED))["no fine-tuning"] == ["61.00 ± 1.00"] * 3


def test_integers_against_floats(runs: Runs) -> None:
    table = rows(integer_table(runs, DIGITS))
    assert table["ZO-Feat-Cls1"] == ["-0.50 ± 0.00", "+0.25 ± 0.00"]
    assert table["Full BP"] == ["-0.50 ± 0.00", "same run"]


def test_only_shared_seeds_are_compared() -> None:
    gone = ("cls1", 2)
    runs = Runs(study(ran=lambda c: c.section != "grid" or (c.method, c.seed) != gone), "cpu")
    assert rows(gain_table(runs, DIGITS))["Cls1 over its control"][0] == "+1.05 ± 0.05 (2)"


# ---- floors


def by_promise(found: list[Floor], of: str) -> dict[str, tuple[str, str]]:
    return {f.promise.split(":")[0]: (f.status, f.measured) for f in found if f.of == of}


def test_claims_leave_the_float_loss_out(tmp_path: Path) -> None:
    def better(cell: Cell) -> float:
        lifted = cell.arithmetic == "int8-float" and cell.method == "cls1"
        return made_up(cell) + 1.5 * lifted

    found = rows(claims([Runs(study(accuracy=better), "cpu")], tmp_path))
    assert [line[1] for line in found.values()][:2] == ["+18.1 to +18.1 points"] * 2


def test_floors_kept(runs: Runs, tmp_path: Path) -> None:
    found = by_promise(floors([runs], tmp_path), "Digits, FP32")
    assert found["over Full ZO"] == ("kept", "Cls1: +18.10 ± 0.06 (n = 3)")
    assert found["over its control"] == ("kept", "Cls1: +1.10 ± 0.06 (n = 3)")


def test_floors_broken(tmp_path: Path) -> None:
    def small(cell: Cell) -> float:
        """Cls1 is 5.1 over Full ZO; 0.1, -0.1 and 0.3 over its control: 0.1 with error 0.115."""
        if cell.method == "cls1":
            return 83.1
        control = {0: 83.0, 1: 83.2, 2: 82.8}.get(cell.seed, 83.0)
        return control if cell.method == "frozen-cls1" else 78.0

    found = by_promise(floors([Runs(study(accuracy=small), "cpu")], tmp_path), "Digits, FP32")
    assert found["over Full ZO"] == ("broken", "Cls1: +5.10 ± 0.00 (n = 3)")
    assert found["over its control"] == ("broken", "Cls1: +0.10 ± 0.12 (n = 3)")


def test_one_seed_has_no_standard_error(tmp_path: Path) -> None:
    alone = Runs(study(replace(SMALL, seeds=1)), "cpu")
    found = by_promise(floors([alone], tmp_path), "Digits, INT8")
    assert found["over its control"][0] == "not measured"
    assert found["over Full ZO"] == ("kept", "Cls1: +18.00 (n = 1)")


def test_floors_without_results(tmp_path: Path) -> None:
    assert {f.status for f in floors([], tmp_path)} == {"not measured"}
    part = Runs(study(ran=lambda c: c.method != "cls2"), "cpu")  # which is better, is not known
    found = by_promise(floors([part], tmp_path), "Digits, FP32")
    assert {status for status, _ in found.values()} == {"not measured"}


def elastic(cls2: int) -> dict[str, Any]:
    """A curve of three cuts."""
    points = [
        {
            "cut": cut,
            "recipe": recipe,
            "tail_parameters": 10,
            "accuracies": [90.0, 92.0],
            "measured_bytes": size,
            "predicted_bytes": size,
            "step": {"us": 1000.0},
            "over_full_zo": {"median": 1.0},
        }
        for cut, recipe, size in ((0, "full-bp", 4000), (1, "cls2", cls2), (2, "full-zo", 1000))
    ]
    return {
        "command": "python -m experiments.studies.elastic --data digits",
        "reduced": False,
        "model": "lenet5",
        "batch_size": 64,
        "settings": {"0": {"data": "digits"}},
        "points": points,
        "checks": {"a promise": False},
    }


@pytest.mark.parametrize(("size", "status"), [(1017, "kept"), (1018, "broken")])
def test_memory_floor(tmp_path: Path, size: int, status: str) -> None:
    write_json(tmp_path / "elastic_digits_lenet5.json", elastic(size))
    (floor,) = memory_floors(tmp_path)
    assert (floor.status, floor.of) == (status, "LeNet-5 on Digits, batch 64")
    assert floor.measured == f"+{(size - 1000) / 10:.3f} %, measured peaks"


def test_memory_floor_of_each_network(tmp_path: Path) -> None:
    """The worst of its settings, each over Full ZO of the same batch and pairing."""
    peaks = {
        ("vgg11", 32, "stacked"): (2000, {"momentum": 1990, "adam": 2034}),
        ("vgg11", 32, "sequential"): (1000, {"adam": 1018}),
        ("lenet5", 32, "stacked"): (1000, {"adam": 1017}),
    }
    rows = []
    for (network, batch, pairing), (full, tails) in peaks.items():
        place = {"network": network, "batch": batch, "pairing": pairing, "error": 0.0}
        rows.append({**place, "method": "full-zo", "optimizer": "momentum", "measured": full})
        rows += [
            {**place, "method": m, "optimizer": kind, "measured": size * by}
            for kind, size in tails.items()
            for m, by in (("cls2", 1), ("cls1", 2))
        ]
    write_json(tmp_path / "memory_model.json", {"rows": rows})
    vgg, lenet = memory_floors(tmp_path)
    assert (vgg.of, vgg.status) == ("VGG-11, 3 settings", "broken")
    assert vgg.measured == "-0.500 to +1.800 %, measured peaks"
    assert (lenet.status, lenet.measured) == ("kept", "+1.700 to +1.700 %, measured peaks")


def test_a_rehearsal_is_no_measurement(tmp_path: Path) -> None:
    write_json(tmp_path / "elastic_digits_lenet5.json", elastic(1000) | {"reduced": True})
    assert [f.status for f in memory_floors(tmp_path)] == ["not measured"]
    assert "elastic_digits" not in command.page(tmp_path)


# ---- the page


class Page(HTMLParser):
    """Sources and links of a page, tags that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.sources += [found["src"] or ""] if "src" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of most results; half the head's rate is the best of fp32's."""

    def better(cell: Cell) -> float:
        return made_up(cell) + (1.0 if cell.candidate == "head x 0.5" else 0.0)

    folder = tmp_path_factory.mktemp("results")
    ran = study(
        accuracy=better, ran=lambda c: (c.section, c.arithmetic) != ("finetune", "int8-float")
    )
    ran["missing"].append(ran["runs"][0] | {"why": "<script>"})
    write_json(folder / "paper_cpu.json", ran)
    write_json(folder / "elastic_digits_lenet5.json", elastic(1010))
    out = folder / "docs" / "index.html"
    assert command.main(["--results", str(folder), "--out", str(out)]) == 0
    return out.read_text()


def test_the_page_holds_everything_and_names_what_is_missing(text: str) -> None:
    page = Page(text)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert len(page.sources) == 2 and all(s.startswith("data:image/") for s in page.sources)
    inside = {link.removeprefix("#") for link in page.links if link.startswith("#")}
    assert inside == set(page.ids)
    outside = {link for link in page.links if not link.startswith("#")}
    assert outside == {"https://arxiv.org/abs/2501.04287", "data:,"}
    assert "96.10 ± 0.10" in text and "+1.10 ± 0.06" in text
    assert "python -m experiments.studies.elastic --data digits" in text
    for source in SOURCES:
        assert (source.command in text) == (source.pattern != "elastic_*.json")
    assert "Study, preset gpu: python -m experiments.paper --preset gpu" in text
    missing = "preset cpu, finetune, Digits turned 30°, INT8, float loss: 9 runs (not run)"
    assert missing in text


def test_the_same_results_give_the_same_picture(runs: Runs) -> None:
    first = dots(runs, DIGITS)
    assert first is not None and first == dots(runs, DIGITS)
    assert dots(Runs(study(ran=lambda c: c.section != "grid"), "cpu"), DIGITS) is None


def test_a_page_without_results(tmp_path: Path) -> None:
    text = command.page(tmp_path)
    assert Page(text).sources == []
    assert all(source.command in text for source in SOURCES)
    assert text.count("not measured") >= 3


def test_what_results_say_is_escaped(text: str) -> None:
    assert "<script>" not in text and "(&lt;script&gt;)" in text


def test_the_chosen_setting_stands_out(text: str) -> None:
    assert '<span class="best">head x 0.5: 79.00</span>' in text  # Full ZO, fp32
    assert '<span class="best">recipe: 99.00</span>' in text  # Full BP has no head


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index.html"
    assert command.main(["--results", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "results must be a folder, got" in capsys.readouterr().err
    (tmp_path / "step_cpu.json").write_text("{")
    assert command.main(["--results", str(tmp_path), "--out", str(out)]) == 2
    assert "step_cpu.json is no JSON" in capsys.readouterr().err
    assert not out.exists()


def int8_step() -> dict[str, Any]:
    """Two methods, one batch."""
    time = [
        {
            "batch": 32,
            "method": method,
            "fp32": {"us": 6000.0},
            "int8": {"us": 2000.0},
            "speedup": {"median": speedup},
            "passes": {"speedup": {"median": 3.5}},
        }
        for method, speedup in (("full-zo", 3.0), ("cls2", 2.5), ("full-bp", 0.5))
    ]
    memory = [
        {
            "batch": 32,
            "method": "cls2",
            "pairing": "stacked",
            "fp32": {"measured": 3_000_000, "static": 160},
            "int8": {"measured": 1_000_000, "static": 100},
            "ratio": 3.0,
        }
    ]
    return {"command": "x", "clock": "CPU time", "rounds": 9, "time": time, "memory": memory}


def test_int8_step(tmp_path: Path) -> None:
    time, memory = map(rows, measured.int8_step(int8_step()))
    assert time["ZO-Feat-Cls2, batch 32"] == ["6.00", "2.00", "2.50x", "3.50x"]
    assert memory["ZO-Feat-Cls2, batch 32, stacked"] == ["3.00", "1.00", "3.00x", "1.60x"]
    write_json(tmp_path / "int8_step_cpu.json", int8_step())
    claimed = rows(claims([], tmp_path))
    assert claimed["time of FP32 over INT8"] == ["1.38 to 1.42x", "2.50 to 3.00x"]  # not Full BP
    assert claimed["memory of FP32 over INT8"] == ["1.46 to 1.60x", "3.00 to 3.00x"]


def test_integer_signs() -> None:
    found = {"0": {"wrong": 0.1, "zero": 0.02}, "12": {"wrong": 0.0004, "zero": 0.0}}
    run = {"data": "mnist", "method": "cls1", "batch": 32, "steps": 100, "fraction_bits": found}
    costs = {"0": 10.4, "12": 11.0, "float64": 50.0}
    content = {"smallest_fraction_bits": 12, "rows": [run | {"cost_us": costs}]}
    differ, cost = measured.integer_signs(content)
    name = "MNIST, ZO-Feat-Cls1, batch 32"
    assert rows(differ)[name] == ["100", "10.00 / 2.00", "0.04 / 0.00"]
    assert rows(cost)[name] == ["10", "11", "50"] and "with F = 12" in differ.caption


def test_results_of_another_layout_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "breakdown_cpu.json", {"command": "x"})
    assert command.main(["--results", str(tmp_path), "--out", str(tmp_path / "i.html")]) == 2
    assert "breakdown_cpu.json is not of a known layout: 'rows' is" in capsys.readouterr().err


def test_a_study_of_another_layout_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "paper_cpu.json", {"command": "x", "seeds": [0]})
    assert command.main(["--results", str(tmp_path), "--out", str(tmp_path / "i.html")]) == 2
    assert "paper_cpu.json is not of a known layout: 'tasks' is missing" in capsys.readouterr().err


def test_what_made_the_sections_is_said() -> None:
    sections = {
        "eps": {"seeds": [0], "hardware": "a machine", "commit": "0123456789abcdef"},
        "tail": {"seeds": [0, 1], "hardware": "a machine", "commit": "f" * 40},
    }
    told = "a machine; commit 0123456789; commit ffffffffff; seeds 0; seeds 0, 1"
    assert made_by({"command": "x", "sections": sections}) == told
    assert made_by({"commits": ["0" * 40], "hardware": ["a", "b"]}) == "a; b; commit 0000000000"


def test_results_that_nobody_described() -> None:
    content: Mapping[str, Any] = {
        "command": "x",
        "rows": [{"a": 1, "b": {"c": 2.34567, "d": True}}, {"a": 2, "e": "text"}],
        "batches": {"32": {"ms": 1.5}},
        "versions": {"torch": {"x": 1}},
    }
    first, second = generic_tables(content)
    assert (first.head, first.rows) == (
        ["a", "b c", "b d", "e"],
        [["1", "2.346", "yes", ""], ["2", "", "", "text"]],
    )
    assert (second.head, second.rows) == (["batches", "ms"], [["32", "1.5"]])
