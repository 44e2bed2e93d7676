"""Predicted peaks against recorded ones, the plan, the static formulas, the elastic curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from elasticzo.int8.memory import int8_training_memory
from elasticzo.models import LeNet5
from experiments.files import read_checked, write_checked
from experiments.studies import elastic, memory_model, plan
from experiments.studies.elastic import checks, method_of
from experiments.studies.memory_model import Case, predicted, row_of
from experiments.studies.plan import PlanConfig, make_plan, parse_bytes
from experiments.studies.static_memory import sizes, static_bytes
from experiments.train.memory import recorded_peak

CPU = torch.device("cpu")
CASES = [
    Case("lenet5", 256),
    Case("lenet5", 256, "full-zo"),
    Case("lenet5", 256, "cls2", "sequential", "adam"),
    Case("lenet5", 32, "cls1", "stacked", "adam"),
    Case("lenet5", 256, "full-bp"),
    Case("resnet20", 8, "cls1", "sequential", "adam"),
    Case("vgg11", 8, "cls2", "stacked"),
    Case("pointnet", 4, "cls1", "stacked", "adam"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.network}-{c.batch}-{c.method}")
def test_predictions_within_five_per_cent(case: Case) -> None:
    row = row_of(case, CPU)
    assert abs(row["error"]) <= 0.05, row


@pytest.mark.parametrize("tail", [0, 1, "all"])
def test_integer_predictions_within_five_per_cent(tail: int | str) -> None:
    x = Int8Tensor(torch.zeros(256, 1, 28, 28, dtype=torch.int8), torch.tensor(-7).int())
    y = torch.zeros(256, dtype=torch.int64)
    model = ElasticZOInt8(LeNet5(), tail).train()
    found = int8_training_memory(model, x).peak
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=4)

    def step() -> None:
        logits = model(x)
        losses = model.losses(logits, y)
        model.backward(logits, y)
        bp.step()
        zo.step(losses)

    there = sum(t.nbytes for t in (x.q, x.exponent, y, *model.buffers()))
    assert found.bytes == pytest.approx(there + recorded_peak(step), rel=0.05)


# ---- the paper's formulas


def test_static_formulas_give_the_papers_figures() -> None:
    one = torch.zeros(1, 1, 28, 28)
    counted = sizes(LeNet5(), one)
    assert sum(counted.parameters.values()) == 107_786
    assert (counted.activations, sum(counted.outputs.values())) == (18_058, 8_054)
    for batch, ratio in ((32, 1.60), (256, 1.46)):
        x = one.expand(batch, 1, 28, 28)
        full, int8 = static_bytes(LeNet5(), x, 0), static_bytes(LeNet5(), x, 0, "int8")
        assert full is not None and int8 is not None
        assert full == 4 * (107_786 + 18_058 * batch)
        assert round(full / int8, 2) == ratio
        assert static_bytes(LeNet5(), x, "all") == 2 * full
    cls2 = static_bytes(LeNet5(), x, ["fc3"])
    assert cls2 is not None and round(100 * (cls2 / full - 1), 3) == 0.072
    assert static_bytes(LeNet5(), x, 1, "int8") is None


# ---- the plan


def test_sizes_in_words() -> None:
    assert [parse_bytes(t) for t in ("20MB", "1.5 KiB", "7", "2gb")] == [
        20_000_000,
        1536,
        7,
        2 * 10**9,
    ]
    for text in ("", "MB", "20 QB", "-1MB", "1e6"):
        with pytest.raises(ValueError, match="budget must be a size like 20MB"):
            parse_bytes(text)


def test_plan_is_what_the_model_says() -> None:
    config = PlanConfig(batch_size=32, pairing="sequential", tail_optimizer="momentum")
    found = make_plan(config)
    assert [(c.cut, c.tail) for c in found.cuts] == [
        (0, "all"),
        (1, 4),
        (2, 3),
        (3, 2),
        (4, 1),
        (5, 0),
    ]
    assert [c.parameters for c in found.cuts[-3:]] == [11_014, 850, 0]
    peaks = [c.memory.peak.bytes for c in found.cuts if c.memory is not None]
    assert peaks[4] == predicted(Case("lenet5", 32, "cls2", "sequential", "momentum"), CPU)
    assert found.inference == predicted(Case("lenet5", 32), CPU) < min(peaks)
    least = found.largest_within(min(peaks))
    assert least is found.cuts[peaks.index(min(peaks))]
    assert found.largest_within(min(peaks) - 1) is None
    assert found.largest_within(10**9) is found.cuts[0]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_plan_command(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch-size", "32", "--method", "cls2", "--precision", precision]
    assert plan.main([*arguments, "--budget", "100MB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a plain pass holds" in lines[0]
    cls2 = next(line for line in lines if line.startswith("4"))
    assert cls2.split()[:2] == ["4", "fc3"] and "cls2" in cls2
    assert any("auto" in line and "fits" in line for line in lines)


def test_plan_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--budget", "much"]) == 2
    assert "budget must be a size like 20MB, 18.5MiB or 4096, got 'much'" in capsys.readouterr().err
    assert plan.main(["--batch-size", "0"]) == 2
    assert "batch_size must be >= 1, got 0" in capsys.readouterr().err
    assert plan.main(["--model", "resnet20", "--precision", "int8"]) == 2
    assert "precision int8 takes model lenet5, pointnet, got 'resnet20'" in capsys.readouterr().err
    assert plan.main(["--queries", "0"]) == 2
    assert "queries must be >= 1, got 0" in capsys.readouterr().err
    wanted = "device must be auto, cpu, cuda or cuda:<n>, got 'tape'"
    for command in (plan, memory_model):
        assert command.main(["--device", "tape"]) == 2
        assert wanted in capsys.readouterr().err
    assert memory_model.main(["--threads", "0"]) == 2
    assert "threads must be in [1, 1024], got 0" in capsys.readouterr().err
    assert memory_model.main(["--batches", "32", "0"]) == 2
    assert "batches must be at least one number >= 1, got (32, 0)" in capsys.readouterr().err
    assert memory_model.main(["--networks", "alexnet"]) == 2
    assert "networks and optimizers must be of" in capsys.readouterr().err


def test_grid_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = memory_model.cases(memory_model.GridConfig())
    assert len(every) == len(set(every)) == 4 * 2 * (1 + 2 + 2 * 2 * 2 + 2)
    monkeypatch.setattr(memory_model, "cases", lambda config: [every[0], every[2]])
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert memory_model.main(arguments) == 0
    written = json.loads((tmp_path / "memory_model.json").read_text())
    assert [row["method"] for row in written["rows"]] == [None, "full-zo"]
    assert 0 < written["largest_error"] < 0.05
    again = []

    def row_of(case: Case, *rest: object, **more: object) -> dict[str, object]:
        again.append(case)
        return {**vars(case), "predicted": 1, "measured": 1, "error": 0.0}

    monkeypatch.setattr(memory_model, "row_of", row_of)
    assert memory_model.main(arguments) == 0 and again == []  # every cell is there
    kept = tmp_path / "runs" / "rows.json"
    write_checked(kept, {**read_checked(kept, "-"), "hardware": "another, 2 threads"})
    assert memory_model.main([*arguments, "--batches", "32"]) == 0
    assert again == [every[0], every[2]]  # elsewhere measured: none of it is taken
    written = json.loads((tmp_path / "memory_model.json").read_text())
    assert written["command"] == "python -m experiments.studies.memory_model --batches 32"


# ---- the elastic curve


def test_elastic_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--reduced", "--threads", "1", "--device", "cpu", "--batch-size", "16", "--every", "4",
        "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    assert elastic.main(arguments) == 0
    text = (tmp_path / "results" / "elastic_digits_lenet5.json").read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert [p["cut"] for p in written["points"]] == [0, 4, 5]
    assert [p["recipe"] for p in written["points"]] == ["full-bp", "cls2", "full-zo"]
    assert [p["tail_parameters"] for p in written["points"]] == [107_786, 850, 0]
    assert all(abs(p["error"]) <= 0.05 and p["step"]["us"] > 0 for p in written["points"])
    assert all(written["checks"].values()) and written["command"].endswith("--every 4 --reduced")
    assert (tmp_path / "results" / "elastic_digits_lenet5.png").exists()
    assert "kept: predictions within 5%" in capsys.readouterr().out


def test_elastic_promises() -> None:
    assert [method_of(c, 5) for c in range(6)] == [
        "full-bp",
        "cls1",
        "cls1",
        "cls1",
        "cls2",
        "full-zo",
    ]
    point = {"error": 0.01, "measured_bytes": 1017, "predicted_bytes": 1018, "recipe": "cls2"}
    full = {"error": -0.04, "measured_bytes": 1000, "predicted_bytes": 1000, "recipe": "full-zo"}
    assert list(checks([point, full]).values()) == [True, True, False]
    assert list(checks([point, {**full, "error": -0.06}]).values()) == [False, True, False]


def test_elastic_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert elastic.main(["--seeds", "0"]) == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    assert elastic.main(["--out", str(tmp_path / "runs")]) == 2
    assert "data_dir must name their folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
