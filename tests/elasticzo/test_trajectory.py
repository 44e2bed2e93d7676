"""The trajectory log: a run of the head, replayed bit for bit."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses, read_trajectory, replay
from elasticzo.models import LeNet5

X, Y = torch.randn(8, 1, 28, 28), torch.arange(8)


def start(**settings: Any) -> tuple[ElasticZO, ZOSGD]:
    torch.manual_seed(3)
    model = ElasticZO(LeNet5(), **{"tail": 0, "seed": 5, **settings}).train()
    fast = [model.module.conv1.weight]
    zo = ZOSGD(model, lr=1e-4, clip=10.0, weight_decay=1e-3, groups=[{"params": fast, "lr": 1e-3}])
    return model, zo


def steps(model: ElasticZO, zo: ZOSGD, count: int, bad: int | None = None) -> None:
    schedule = torch.optim.lr_scheduler.ExponentialLR(zo, 0.9)
    for i in range(count):
        losses = pair_losses(F.cross_entropy, model(X), Y)
        zo.step(losses * float("nan") if i == bad else losses)
        schedule.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("queries", [1, 2], ids=["Q1", "Q2"])
def test_replay_rebuilds_the_head_bit_for_bit(tmp_path: Path, queries: int, noise: str) -> None:
    settings = {"queries": queries, "noise": noise, "scale": {"fc1.*": 0.5, "fc2.bias": 0.0}}
    model, zo = start(**settings)
    log = TrajectoryLog(tmp_path / "log", zo, capacity=4)  # the ring fills and drains by itself
    steps(model, zo, 10, bad=6)
    assert len((tmp_path / "log").read_text().splitlines()) == 1 + 8
    log.drain()
    fresh, _ = start(**settings)
    assert not equal(fresh.module, model.module)
    assert replay(tmp_path / "log", fresh) == 10
    assert equal(fresh.module, model.module)
    assert fresh.step_index == model.step_index == 10
    header, records = read_trajectory(tmp_path / "log")
    assert header["seed"] == 5 and header["versions"]["torch"] == version("torch")
    assert [r["skipped"] for r in records] == [0] * 6 + [1] + [0] * 3
    assert records[2]["lr"] == pytest.approx([0.81e-3, 0.81e-4], rel=1e-12)


def test_replay_of_a_part_and_of_a_log_that_was_cut_off(tmp_path: Path) -> None:
    model, zo = start()
    log = TrajectoryLog(tmp_path / "log", zo)
    steps(model, zo, 3)
    middle = copy.deepcopy(model.module)
    steps(model, zo, 3)
    log.drain()
    part, _ = start()
    assert replay(tmp_path / "log", part, steps=3) == 3
    assert equal(part.module, middle)
    text = (tmp_path / "log").read_text()
    (tmp_path / "log").write_text(text[:-20])  # a crash in the middle of a line
    part, _ = start()
    assert replay(tmp_path / "log", part) == 5


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    model, zo = start()
    log = TrajectoryLog(tmp_path / "log", zo)
    steps(model, zo, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(zo.state_dict())
    steps(model, zo, 2)
    log.drain()
    again, zo_again = start()
    again.load_state_dict(weights)
    zo_again.load_state_dict(state)
    log = TrajectoryLog(tmp_path / "log", zo_again, resume=True)
    steps(again, zo_again, 3)
    log.drain()
    assert [r["step"] for r in read_trajectory(tmp_path / "log")[1]] == [0, 1, 2, 3, 4]
    fresh, _ = start()
    replay(tmp_path / "log", fresh)
    assert equal(fresh.module, again.module)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, zo = start()
    log = TrajectoryLog(tmp_path / "log", zo)
    steps(model, zo, 3)
    log.drain()
    with pytest.raises(FileExistsError, match="exists; give another path, or resume=True"):
        TrajectoryLog(tmp_path / "log", zo)
    with pytest.raises(ValueError, match=r"capacity must be an integer in \[1, 2\^24\], got 0"):
        TrajectoryLog(tmp_path / "new", zo, capacity=0)
    _, other = start(eps=1e-2)
    with pytest.raises(ValueError, match="is the log of another run: eps differ"):
        TrajectoryLog(tmp_path / "log", other, resume=True)
    with pytest.raises(ValueError, match=r"'fc3.weight', which is not in this model's head"):
        replay(tmp_path / "log", ElasticZO(LeNet5(), tail=["fc3"]))
    with pytest.raises(ValueError, match="made on backend 'numba', this model runs 'reference'"):
        replay(tmp_path / "log", ElasticZO(LeNet5(), tail=0, backend="reference"))
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "gap").write_text("\n".join([lines[0], lines[1], lines[3]]) + "\n")
    with pytest.raises(ValueError, match="line 3 is corrupt, it does not match"):
        replay(tmp_path / "gap", start()[0])
    (tmp_path / "bad").write_text("\n".join([lines[0], "{", lines[1]]) + "\n")
    with pytest.raises(ValueError, match="line 2 is corrupt"):
        read_trajectory(tmp_path / "bad")
    (tmp_path / "foreign").write_text(json.dumps({"format": "x"}))
    with pytest.raises(ValueError, match="is not a trajectory log"):
        read_trajectory(tmp_path / "foreign")
