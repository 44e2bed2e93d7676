"""A run that is killed at any moment and started again ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticzo import read_trajectory, replay
from elasticzo.checkpoint import load_checkpoint
from experiments.train.__main__ import command_line
from experiments.train.config import TrainConfig
from experiments.train.folder import CHECKPOINT, METRICS, RESULT, TRAJECTORY, read_metrics
from experiments.train.network import build_network
from experiments.train.resolve import resolve
from experiments.train.run import train

ROOT = Path(__file__).resolve().parents[3]
QUICK = [
    *("--device", "cpu", "--threads", "1", "--no-tensorboard", "--no-plot"),
    *("--eval-epochs", "3", "--checkpoint-steps", "10"),
]
SAME: dict[str, Any] = {
    "device": "cpu", "threads": 1, "tensorboard": False, "plot": False, "eval_epochs": 3
}  # fmt: skip
DEADLINE_S = 120.0
TIMES = ("seconds", "ms_per_step")  # what no two runs share


def launch(out: Path, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.train", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def await_that(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    while not condition() and process.poll() is None:
        assert time.monotonic() - started < DEADLINE_S, "the run does not get on"
        time.sleep(0.002)


def written(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0.0


def kill_and_finish(out: Path, arguments: list[str], kills: int, chance: random.Random) -> int:
    """Kill -9 the command `kills` times, each at a random moment after it began to learn, then let
    it end. Returns how many of the kills came before the end."""
    done = 0
    for _ in range(kills):
        before = written(out / CHECKPOINT)
        process = launch(out, arguments)
        await_that(lambda b=before: written(out / CHECKPOINT) != b, process)
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
    process = launch(out, arguments)
    text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, text
    assert "going on at step" in text
    return done


def assert_same(a: Any, b: Any, name: str = "state") -> None:
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    elif isinstance(a, dict):
        assert list(a) == list(b), name
        for key, value in a.items():
            if key not in (*TIMES, "metrics_bytes", "metrics_digest"):
                assert_same(value, b[key], f"{name}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, value in enumerate(a):
            assert_same(value, b[i], f"{name}[{i}]")
    else:
        assert a == b, name


def assert_same_runs(out: Path, wanted: Path) -> None:
    """Weights, buffers, optimisers, and every line of the metrics but its times."""
    assert_same(load_checkpoint(out / CHECKPOINT), load_checkpoint(wanted / CHECKPOINT))
    lines = [list(read_metrics(folder / METRICS)) for folder in (out, wanted)]
    assert_same(*lines)
    assert not list(out.glob(".*")), "a temporary file was left behind"


@pytest.mark.slow
def test_killed_cls2_with_batch_norm_and_momentum(tmp_path: Path) -> None:
    arguments = [
        *QUICK, "--model", "resnet20", "--method", "cls2", "--tail-optimizer", "sgd",
        "--batch-size", "4", "--train-images", "60", "--epochs", "3", "--checkpoint-steps", "4",
    ]  # fmt: skip
    config = TrainConfig(
        model="resnet20", method="cls2", tail_optimizer="sgd", batch_size=4, train_images=60,
        epochs=3, checkpoint_steps=1000, out=tmp_path / "whole", **SAME,
    )  # fmt: skip
    train(config)
    kills = kill_and_finish(tmp_path / "killed", arguments, 1, random.Random(0))
    assert kills == 1
    assert_same_runs(tmp_path / "killed", tmp_path / "whole")
    state = load_checkpoint(tmp_path / "killed" / CHECKPOINT)
    assert any("running_var" in name for name in state["model"])
    momenta = [s["momentum_buffer"] for s in state["tail"]["state"].values()]
    assert momenta and all(m.abs().max() > 0 for m in momenta)


@pytest.mark.slow
def test_killed_full_zo_and_its_replay(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "full-zo", "batch_size": 32, "epochs": 5, **SAME}
    arguments = [*QUICK, "--method", "full-zo", "--batch-size", "32", "--epochs", "5"]
    train(TrainConfig(**settings, out=tmp_path / "whole"))
    out = tmp_path / "killed"
    assert kill_and_finish(out, arguments, 2, random.Random(1)) == 2
    assert_same_runs(out, tmp_path / "whole")

    model = build_network(resolve(TrainConfig(**settings)))
    first = {k: v.clone() for k, v in model.state_dict().items()}
    steps = len(read_trajectory(out / TRAJECTORY)[1])
    assert steps == 5 * (1438 // 32)
    assert replay(out / TRAJECTORY, model) == steps
    wanted = load_checkpoint(out / CHECKPOINT)["model"]
    assert_same(dict(model.state_dict()), wanted)
    assert any(not torch.equal(first[k], wanted[k]) for k in wanted)


@pytest.mark.slow
def test_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    arguments = [*QUICK, "--checkpoint-steps", "1000", "--epochs", "5", "--method", "cls2"]
    process = launch(out, arguments)
    await_that(lambda: written(out / METRICS) > 0 and (out / METRICS).stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGINT, text
    assert "interrupted (SIGINT) at step" in text
    command = command_line("experiments.train", ["--out", str(out), *arguments])
    assert command in text
    step = load_checkpoint(out / CHECKPOINT)["step"]
    assert 0 < step < 5 * (1438 // 64) and not (out / RESULT).exists()

    process = launch(out, arguments)
    text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and f"going on at step {step}" in text, text
    train(TrainConfig(method="cls2", epochs=5, out=tmp_path / "whole", **SAME))
    assert_same_runs(out, tmp_path / "whole")
    adam = load_checkpoint(out / CHECKPOINT)["tail"]["state"][0]
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(adam)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "run"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    config = TrainConfig(epochs=1, device="cpu", threads=1, out=out, tensorboard=False, plot=False)
    with pytest.raises(ValueError, match="in use by another process"):
        train(config)
    os.close(descriptor)
    assert not list(out.iterdir())
