"""The training command: what it refuses, what it learns, what it leaves behind."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from elasticzo.checkpoint import load_checkpoint
from experiments.files import read_checked
from experiments.train import learner
from experiments.train.__main__ import main
from experiments.train.config import TrainConfig
from experiments.train.data import load_data
from experiments.train.folder import CHECKPOINT, CONFIG, CURVES, METRICS, RESULT, RunFolder
from experiments.train.network import build_network
from experiments.train.recipes import METHODS, MODELS
from experiments.train.resolve import resolve
from experiments.train.run import Run
from experiments.train.schedules import factor
from tests.experiments.conftest import OF_CLOUDS, Start

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "cls3"}, "method must be one of full-zo, cls2, .*, got 'cls3'"),
    ({"precision": "fp16"}, "precision must be one of fp32, bf16, int8, got 'fp16'"),
    ({"noise": "uniform"}, "noise must be one of normal, rademacher, got 'uniform'"),
    ({"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    ({"eps": math.nan}, r"eps must be in \(0, inf\), got nan"),
    ({"head_lr": -1.0}, r"head_lr must be in \[0, inf\), got -1.0"),
    ({"clip": 0.0}, r"clip must be in \(0, inf\], got 0.0"),
    ({"tail_warmup": 300}, r"tail_warmup must be in \[0, 1\), got 300"),
    ({"queries": 0}, r"queries must be in \[1, .*\], got 0"),
    ({"tail_momentum": 1.0}, r"tail_momentum must be in \[0, 1\), got 1.0"),
    ({"tail_momentum": 0.5, "tail_optimizer": "adam"}, "tail_momentum belongs to .* 'sgd', got"),
    ({"batch_size": 0}, r"batch_size must be in \[1, inf\), got 0"),
    ({"batch_size": 769}, r"batch_size must be in \[1, 768\] \(training images\), got 769"),
    ({"train_images": 9999}, r"train_images must be in \[1, 1438\], got 9999"),
    ({"hold_out": 5000}, r"n_valid must be in 1\.\.1437 .*, got 5000"),
    ({"epochs": 0}, r"epochs must be in \[1, .*\], got 0"),
    ({"seed": 2**63}, r"seed must be in \[0, .*\], got 9223372036854775808"),
    ({"tail": ()}, "tail must name a module, .*, got nothing"),
    ({"tail": ("fc9",)}, "unknown module 'fc9'; layers of this model: conv1"),
    ({"tail": ("7",)}, r"must be in 0\.\.5 for this model, got 7"),
    ({"scale": {"fc3.*": 1.0}}, r"scale must match parameters of the head \(conv1.*, got 'fc3"),
    ({"scale": {"fc1.*": -1.0}}, r"scale of 'fc1.\*' must be in \[0, inf\), got -1.0"),
    ({"data": "mnist"}, "data_dir must name their folder"),
    ({"data": "mnist", "data_dir": Path("/nowhere")}, "train-images.* is neither in /nowhere"),
    ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:<n>, got 'tpu'"),
    ({"device": "cuda:99"}, "device 'cuda:99': torch sees"),
    ({"precision": "bf16", "eps": 1e-7}, "vanishes in torch.bfloat16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_refuses_before_it_writes(
    start: Start, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start(**changes)
    assert not any(tmp_path.iterdir())


def test_command_answers_errors_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["--eps", "-1", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "error: eps must be in (0, inf), got -1.0\n"
    with pytest.raises(SystemExit) as stopped:
        main(["--epochs", "many"])
    assert stopped.value.code == 2 and "epochs" in capsys.readouterr().err
    assert not out.exists()


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert f"--{f.name.replace('_', '-')}" in text
    assert text.count("default") >= len(fields(TrainConfig))
    assert "EXPLICIT" not in text


@pytest.mark.parametrize("model", [m for m in MODELS if m != "pointnet"])
@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_decided(model: Any, method: Any) -> None:
    cnn = model == "cnn"
    given: dict[str, Any] = {"data": "cifar10", "data_dir": Path("data")} if cnn else {}
    config = resolve(TrainConfig(model=model, method=method, device="cpu", **given))
    open_fields = {f.name for f in fields(config) if getattr(config, f.name) is None}
    known = {"data_dir", "batch_norm"} if cnn else set()
    assert open_fields == {"data_dir", "train_images", "rotate", "start_from", *OF_CLOUDS} - known
    assert resolve(config) == config
    network = build_network(config)
    head = {name for name, _ in network.named_head_parameters()}
    assert bool(head) == (method in ("full-zo", "cls2", "cls1"))
    assert network.halves == (2 if head else 1)
    assert bool(list(network.tail_parameters())) == (method != "full-zo")


def test_own_cut_keeps_what_fits_of_the_recipe() -> None:
    config = resolve(TrainConfig(method="cls2", tail=("conv2", "fc1", "fc2", "fc3"), device="cpu"))
    assert config.scale is not None and set(config.scale) == {"conv1.*"}
    model = build_network(config)
    assert {n for n, _ in model.named_head_parameters()} == {"conv1.weight", "conv1.bias"}
    by_count = build_network(resolve(TrainConfig(tail=("2",), device="cpu")))
    assert {n.partition(".")[0] for n, _ in by_count.named_tail_parameters()} == {"fc2", "fc3"}


def test_schedules() -> None:
    assert [factor("constant", s, 4) for s in range(4)] == [1.0] * 4
    assert [factor("linear", s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [factor("step", s, 6, drop_steps=2, gamma=0.5) for s in range(6)] == [
        1.0, 1.0, 0.5, 0.5, 0.25, 0.25
    ]  # fmt: skip
    assert [factor("linear", s, 7, warmup=3) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor("cosine", 3, 7, warmup=3) == 1.0
    with pytest.raises(ValueError, match=r"schedule must be .*, got 'exponential'"):
        factor("exponential", 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "epochs", "floor"), [("cls2", 12, 80.0), ("full-zo", 30, 40.0), ("full-bp", 4, 80.0)]
)
def test_learns_the_digits(start: Start, method: str, epochs: int, floor: float) -> None:
    changes = {"method": method, "epochs": epochs, "eval_epochs": epochs, "train_images": None}
    result, _ = start(**changes, batch_size=64, log_steps=1000)
    assert result["test_accuracy"] >= floor
    assert result["skipped"] == 0


def test_what_a_run_leaves_behind(start: Start) -> None:
    result, folder = start(tensorboard=True, plot=True)
    names = {p.name for p in folder.path.iterdir()}
    assert {CONFIG, METRICS, CHECKPOINT, RESULT, CURVES, "trajectory.jsonl", "tensorboard"} == names
    assert read_checked(folder.path / RESULT, "-") == result
    assert result["steps"] == 2 * (768 // 32)
    assert result["ms_per_step"] > 0 and result["seconds"] > 0
    assert result["peak_memory"]["measure"] == "ru_maxrss of the whole process"
    assert result["peak_memory"]["bytes"] > 50e6
    assert {"torch", "python", "elasticzo"} <= set(result["versions"])
    assert result["config"]["tail"] == ["fc3"] and result["backend"] != "auto"
    train_lines, tests = folder.metrics("train"), folder.metrics("test")
    assert [line["step"] for line in train_lines] == list(range(6, 49, 6))
    assert [(line["step"], line["epoch"]) for line in tests] == [(24, 1), (48, 2)]
    assert tests[-1]["test_accuracy"] == result["test_accuracy"]
    for line in [*train_lines, *tests]:
        assert all(math.isfinite(v) for v in line.values() if not isinstance(v, (str, list)))
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert len(train_lines[0]["losses"]) == 2 and len(train_lines[0]["projected_gradient"]) == 1
    assert (folder.path / CURVES).read_bytes().startswith(b"\x89PNG")
    assert any(p.stat().st_size for p in (folder.path / "tensorboard").iterdir())


def test_a_finished_run_is_not_repeated(start: Start, small: TrainConfig) -> None:
    first, folder = start(epochs=1)
    before = (folder.path / METRICS).stat().st_mtime_ns
    again, _ = start(epochs=1)
    assert again == first and (folder.path / METRICS).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another configuration: .*eps was .*, is 0.5"):
        start(epochs=1, eps=0.5)
    with pytest.raises(ValueError, match=r"out must hold no run with --no-resume, got .*run"):
        start(epochs=1, resume=False)
    (folder.path / RESULT).unlink()  # killed between the last checkpoint and the result
    ended, _ = start(epochs=1)
    assert ended["test_accuracy"] == first["test_accuracy"]
    (folder.path / CHECKPOINT).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint"):
        Run(replace(small, epochs=1))


def test_seed_decides(start: Start, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        _, folder = start(out=tmp_path / name, seed=seed, epochs=1)
        return dict(load_checkpoint(folder.path / CHECKPOINT)["model"])

    a, b, c = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])


def trained(folder: RunFolder, config: TrainConfig) -> dict[str, bool]:
    """Which parameters a run moved."""
    torch.manual_seed(0)
    first = build_network(config).state_dict()
    last = load_checkpoint(folder.path / CHECKPOINT)["model"]
    return {name: not torch.equal(first[name], last[name]) for name in last}


def test_frozen_control_moves_the_tail_alone(start: Start, small: TrainConfig) -> None:
    result, folder = start(method="frozen-cls2", epochs=1)
    moved = trained(folder, resolve(replace(small, method="frozen-cls2", epochs=1)))
    assert {name for name, did in moved.items() if did} == {"fc3.weight", "fc3.bias"}
    assert len(folder.metrics("train")[0]["losses"]) == 1
    assert result["test_accuracy"] > 20.0


@pytest.mark.parametrize("method", ["cls2", "full-zo", "full-bp"])
def test_bf16(start: Start, method: str) -> None:
    result, folder = start(method=method, precision="bf16", epochs=1)
    assert result["config"]["eps"] >= 1e-2 and result["skipped"] == 0
    losses = [line["loss"] for line in folder.metrics("train")]
    assert all(math.isfinite(x) for x in losses)
    weights = load_checkpoint(folder.path / CHECKPOINT)["model"]
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_options_of_the_tail_and_the_head(start: Start) -> None:
    result, _ = start(
        epochs=1, queries=2, noise="rademacher", tail_source="plus", tail_optimizer="sgd",
        pairing="sequential", head_schedule="step", tail_warmup=0.2, clip=math.inf,
        head_weight_decay=0.01, tail_weight_decay=0.01, hold_out=100, init="orthogonal",
    )  # fmt: skip
    assert result["config"]["tail_momentum"] == 0.9 and result["config"]["clip"] == "inf"
    assert result["skipped"] == 0 and result["test_accuracy"] > 10.0


def test_a_clean_pass_feeds_the_tail(small: TrainConfig) -> None:
    config = resolve(replace(small, tail_source="clean", tail_optimizer="sgd", tail_lr=0.1))
    taught = learner.FloatLearner(config, load_data(config))
    plain = copy.deepcopy(taught.model.module)
    x, y = taught.inputs.train(0)
    cross_entropy(plain(x), y).backward()  # of the weights before the step, unperturbed
    rate = taught.rates()[1]
    taught.step()
    for name in ("weight", "bias"):
        before, after = getattr(plain.fc3, name), getattr(taught.model.module.fc3, name)
        torch.testing.assert_close(after, before - rate * before.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["full-zo", "cls2", "full-bp"])
def test_nan_losses_are_skipped(
    start: Start, small: TrainConfig, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    def nan_in_training(logits: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
        loss = cross_entropy(logits, y, **settings)
        return loss if settings else loss * math.nan

    monkeypatch.setattr(learner, "cross_entropy", nan_in_training)
    result, folder = start(method=method, epochs=1)
    assert result["skipped"] == result["steps"] == 24
    assert all(line["loss"] is None for line in folder.metrics("train"))
    moved = trained(folder, resolve(replace(small, method=method, epochs=1)))
    assert not any(moved.values())
