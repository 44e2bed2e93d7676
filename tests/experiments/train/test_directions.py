"""The training command by other noise than the paper's: what it learns, refuses, leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import cross_entropy

from elasticzo import read_trajectory, replay
from elasticzo.checkpoint import load_checkpoint
from elasticzo.memory import training_memory
from experiments.train import learner
from experiments.train.config import PAPER, Directions, TrainConfig
from experiments.train.data import load_data
from experiments.train.folder import CHECKPOINT, CONFIG, RESULT, TRAJECTORY
from experiments.train.learner import FloatLearner
from experiments.train.memory import measure_step
from experiments.train.network import build_network
from experiments.train.recipes import METHODS
from experiments.train.resolve import identity, resolve
from experiments.train.run import Run
from tests.experiments.conftest import Start
from tests.experiments.train.test_resume import assert_same_runs

KINDS = get_args(Directions)
FEEDBACK = [kind for kind in KINDS if kind.startswith("feedback")]
HEADS = ("full-zo", "cls2", "cls1")
OF_RESNET = {"model": "resnet20", "batch_size": 4, "train_images": 80, "head_schedule": "step"}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"directions": "dense"}, "directions must be one of weight, rank1, .*, got 'dense'"),
    ({"directions": "auto", "precision": "int8"}, "directions belongs to precision fp32 or bf16"),
    ({"directions": "auto", "method": "full-bp"}, "directions belongs to a method with a head"),
    ({"directions": "node", "method": "frozen-cls2"}, "directions belongs to a method with a head"),
    ({"group": 4}, "group belongs to directions sample or auto, got 4 with 'weight'"),
    ({"group": 4, "directions": "feedback"}, "group belongs to directions sample or auto"),
    ({"group": 0, "directions": "auto"}, r"group must be in \[1, .*\], got 0"),
    ({"group": 4, "precision": "int8"}, "group belongs to precision fp32 or bf16"),
    ({"directions": "feedback", "queries": 2}, "queries must be 1 with directions 'feedback'"),
    ({"directions": "feedback", "noise": "normal"}, "noise must be rademacher .*, got 'normal'"),
    ({"directions": "feedback-zero", "tail_source": "plus"}, "tail_source must be mean or clean"),
    ({"head_optimizer": "adam"}, "head_lr must be given with head_optimizer 'adam'"),
    ({"head_optimizer": "sgd", "directions": "auto"}, "head_lr must be .* of directions auto"),
    ({"head_optimizer": "adam", "precision": "int8"}, "head_optimizer belongs to precision fp32"),
    ({"head_momentum": 0.5, "directions": "auto"}, "head_momentum belongs to head_optimizer 'sgd'"),
    ({"head_momentum": 1.0}, r"head_momentum must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_refuses_before_it_writes(
    start: Start, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(**changes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_paper_does_leaves_the_identity_as_it_was(method: Any, precision: Any) -> None:
    config = resolve(TrainConfig(method=method, precision=precision, device="cpu"))
    named = {} if precision == "int8" else {"head_optimizer": "sgd"}
    said = replace(config, directions="weight", group=1, **named)
    assert not PAPER.keys() & identity(config).keys()
    assert identity(resolve(said)) == identity(config)
    assert config.out is not None and config.out.name.endswith(("-0", "-0-int8"))


@pytest.mark.parametrize("directions", KINDS)
@pytest.mark.parametrize("method", HEADS)
def test_every_kind_has_its_defaults(method: Any, directions: Any) -> None:
    config = resolve(TrainConfig(method=method, directions=directions, device="cpu"))
    undecided = {f.name for f in fields(config) if getattr(config, f.name) is None}
    assert not undecided & {*PAPER, "noise", "eps", "head_lr", "clip"}
    assert resolve(config) == config and config.directions == directions
    if directions != "weight":
        assert identity(config)["directions"] == directions
        assert config.out is not None and config.out.name.endswith(f"-{directions}")
    paper = directions in ("weight", "rank1")
    assert config.head_optimizer == ("sgd" if paper else "adam")
    assert build_network(config).halves == (1 if directions in FEEDBACK else 2)


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before this step."""
    goes_on: Callable[[FloatLearner], None] = FloatLearner.step

    def dies(self: FloatLearner) -> None:
        if self.step_index == step:
            raise KeyboardInterrupt
        goes_on(self)

    monkeypatch.setattr(FloatLearner, "step", dies)


@pytest.mark.parametrize(
    ("directions", "changes"),
    [
        ("feedback", {}),
        ("auto", {"method": "full-zo"}),
        ("sample", {"group": 5, "queries": 2, "tail_source": "clean"}),
        ("rank1", {"head_momentum": 0.9, "head_optimizer": "sgd"}),
        pytest.param("auto", OF_RESNET, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on(
    small: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    directions: Any,
    changes: Any,
) -> None:
    config = replace(small, epochs=1, checkpoint_steps=9, directions=directions, **changes)
    Run(replace(config, out=tmp_path / "whole")).go()
    with monkeypatch.context() as patch:
        crash_at(14, patch)
        with pytest.raises(KeyboardInterrupt):
            Run(config).go()
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["step"] == 9
    Run(config).go()
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)["zo"]
    kept = "momentum_buffer" if directions == "rank1" else "exp_avg_sq"
    assert all(one[kept].abs().max() > 0 for one in state["state"].values())
    learnt = state["zo"].get("learnt", {})
    assert bool(learnt) == (directions == "feedback")
    assert all(m.abs().max() > 0 for m in learnt.values())
    logs = [(tmp_path / name / TRAJECTORY) for name in ("run", "whole")]
    if directions == "feedback":
        assert not any(log.exists() for log in logs)
    else:
        assert logs[0].read_text() == logs[1].read_text()


@pytest.mark.parametrize("directions", ["rank1", "sample", "node", "auto"])
def test_what_replay_needs(start: Start, small: TrainConfig, directions: Any) -> None:
    _, folder = start(directions=directions, epochs=1)
    config = resolve(replace(small, directions=directions, epochs=1))
    inputs = FloatLearner(config, load_data(config)).inputs
    model = build_network(config)
    described = json.loads((folder.path / CONFIG).read_text())
    steps = len(read_trajectory(folder.path / TRAJECTORY)[1])
    batches = None
    if directions in ("node", "auto"):
        assert "inputs of each step" in described["replay"]
        batches = [inputs.train(step)[0] for step in range(steps)]
    else:
        assert "replay" not in described
    assert replay(folder.path / TRAJECTORY, model, batches=batches) == steps == 24
    wanted = load_checkpoint(folder.path / CHECKPOINT)["model"]
    for name, p in model.named_head_parameters():
        assert torch.equal(p, wanted[name]), name


@pytest.mark.parametrize("directions", KINDS)
def test_the_kind_is_named(start: Start, small: TrainConfig, directions: Any) -> None:
    result, folder = start(directions=directions, epochs=1, method="cls1", log_steps=24)
    assert result["config"]["directions"] == directions and result["skipped"] == 0
    described = json.loads((folder.path / CONFIG).read_text())
    kinds = described.get("directions", {})
    assert kinds == json.loads((folder.path / RESULT).read_text()).get("directions", {})
    by = {k.partition(" ")[0] for k in kinds.values()}
    if directions == "auto":
        assert by == {"sample", "node"} and kinds["fc1.weight"].startswith("node")
    else:
        assert by == ({directions.partition("-")[0]} - {"weight"})
    title = Run(replace(small, directions=directions, out=folder.path.parent / "other")).title
    assert title == "cls2 on digits, seed 0" or f"cls2 by {directions} on digits" in title
    assert len(folder.metrics("train")[0]["losses"]) == (1 if directions in FEEDBACK else 2)
    assert ("no log" in described.get("replay", "")) == (directions in FEEDBACK)


def test_the_head_follows_its_schedule(small: TrainConfig) -> None:
    config = resolve(replace(small, directions="auto", head_schedule="linear", head_warmup=0.0))
    taught = FloatLearner(config, load_data(config))
    assert config.head_lr is not None
    for step in range(3):
        taught.step()
        rate = taught.zo.param_groups[0]["lr"]
        assert rate == pytest.approx(config.head_lr * (1 - step / taught.steps))


@pytest.mark.parametrize("directions", ["weight", "feedback"])
def test_a_noisy_pass_meets_the_tail_of_the_clean_one(small: TrainConfig, directions: Any) -> None:
    config = resolve(replace(small, directions=directions))
    taught = FloatLearner(config, load_data(config))
    order: list[str] = []
    assert taught.tail is not None
    taught.tail.register_step_post_hook(lambda *_: order.append("tail"))
    taught.zo.register_step_post_hook(lambda *_: order.append("head"))
    taught.step()
    assert order == (["head", "tail"] if directions == "feedback" else ["tail", "head"])


@pytest.mark.parametrize("directions", ["sample", "auto", "feedback"])
def test_nan_losses_are_skipped(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, directions: Any
) -> None:
    config = resolve(replace(small, directions=directions))
    taught = FloatLearner(config, load_data(config))
    taught.step()
    first = taught.state()

    def nan(logits: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
        return cross_entropy(logits, y, **settings) * math.nan

    monkeypatch.setattr(learner, "cross_entropy", nan)
    taught.step()
    last = taught.state()
    assert taught.skipped == 1
    assert all(torch.equal(w, last["model"][name]) for name, w in first["model"].items())
    learnt = last["zo"]["zo"].get("learnt", {})
    assert all(torch.equal(m, first["zo"]["zo"]["learnt"][name]) for name, m in learnt.items())


@pytest.mark.parametrize("directions", ["sample", "auto", "feedback"])
def test_bf16(start: Start, directions: Any) -> None:
    result, folder = start(directions=directions, precision="bf16", epochs=1)
    assert result["skipped"] == 0
    lines = folder.metrics("train")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("directions", ["sample", "auto", "feedback", "feedback-random"])
def test_memory_of_a_step(small: TrainConfig, directions: Any) -> None:
    config = resolve(replace(small, directions=directions))
    taught = FloatLearner(config, load_data(config))
    x, _ = taught.inputs.train(0)
    predicted = training_memory(taught.model, x, rule=taught.zo.rule).peak
    assert predicted.bytes == pytest.approx(measure_step(config)["bytes"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("directions", "floor"), [("auto", 75.0)])
def test_learns_the_digits(start: Start, directions: str, floor: float) -> None:
    changes = {"directions": directions, "epochs": 15, "eval_epochs": 15, "train_images": None}
    result, _ = start(method="full-zo", **changes, batch_size=64, log_steps=1000)
    assert result["test_accuracy"] >= floor
