"""Habits of users with optimisers and logs of the head: resets, casts, groups, foreign states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elasticzo import (
    ZOSGD,
    ElasticZO,
    TrajectoryLog,
    ZOAdam,
    low_rank,
    one_sided,
    pair_losses,
    replay,
)
from elasticzo.memory import training_memory

X, Y = torch.linspace(-1, 1, 24).view(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def wrapped(tail: Any = 0, **settings: Any) -> ElasticZO:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return ElasticZO(net, tail=tail, **settings).train()


def step(model: ElasticZO, zo: Any) -> None:
    zo.step(pair_losses(F.cross_entropy, model(X.to(next(model.parameters()).dtype)), Y))


def weights(model: ElasticZO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_the_factors_are_the_same_under_autocast() -> None:
    model = wrapped(estimator=low_rank(), eps=0.1)
    direction, session = model.estimator.direction, model.session
    head, w = next(iter(model.head))
    at = (head, w, session.key)
    with torch.autocast("cpu"):
        halves = direction.weights(*at, session.eps, model.estimator.points, None, "reference")
    z = direction.sum(*at, torch.ones(1, dtype=torch.float64), "reference")
    torch.testing.assert_close((halves[0] - halves[1]) / 0.2, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["rule", "estimator"])
def test_a_log_of_another_kind_is_not_continued(other: str, tmp_path: Path) -> None:
    first = wrapped(estimator=one_sided() if other == "estimator" else None)
    zo = ZOAdam(first, lr=0.01) if other == "rule" else ZOSGD(first, lr=0.01)
    log = TrajectoryLog(tmp_path / "log", zo)
    step(first, zo)
    log.drain()
    with pytest.raises(ValueError, match=f"the log of another run: .*{other}"):
        TrajectoryLog(tmp_path / "log", ZOSGD(wrapped(), lr=0.01), resume=True)


@pytest.mark.parametrize(
    "make", [lambda m: ZOSGD(m, 0.01, momentum=0.9), lambda m: ZOAdam(m, 0.01)]
)
def test_state_is_a_user_s_to_clear(make: Any) -> None:
    model = wrapped()
    zo = make(model)
    step(model, zo)
    zo.state.clear()
    other = copy.deepcopy(model)
    fresh = make(other)
    step(model, zo)
    step(other, fresh)
    assert all(map(torch.equal, weights(model), weights(other)))
    assert zo.state_dict()["state"].keys() == fresh.state_dict()["state"].keys()


def test_a_replay_takes_a_group_without_weights_and_keeps_the_count(tmp_path: Path) -> None:
    model, fresh = wrapped(tail=1), wrapped(tail=1)
    groups: Any = [{"params": list(model.head_parameters())}, {"params": [], "lr": 0.5}]
    zo = ZOSGD(model, lr=0.001, groups=groups)
    log = TrajectoryLog(tmp_path / "log", zo)
    for _ in range(3):
        step(model, zo)
    log.drain()
    fresh.session.skips.fill_(2)
    replay(log.path, fresh)
    assert int(fresh.session.skips) == 2
    assert torch.equal(model.module[0].weight, fresh.module[0].weight)


def test_a_log_that_begins_with_a_fresh_state_is_replayed(tmp_path: Path) -> None:
    model = wrapped()
    step(model, ZOSGD(model, lr=0.01))
    start = copy.deepcopy(model)
    zo = ZOAdam(model, lr=0.01)
    log = TrajectoryLog(tmp_path / "log", zo)
    step(model, zo)
    log.drain()
    assert replay(log.path, start) == 2
    assert all(map(torch.equal, weights(model), weights(start)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(state={17: {}}), "must be of 4 weights at most"),
        (lambda s: s.update(state=None), "must be of 4 weights at most"),
        (lambda s: s["param_groups"][0].pop("betas"), "without betas"),
        (lambda s: s["param_groups"][0].update(betas=(2.0, 0.5)), r"betas\[0\] must be in"),
        (
            lambda s: s["state"][0].update(step=torch.tensor(3)),
            r"step of state\[0\] must be",
        ),
    ],
)
def test_foreign_states_are_refused_whole(damage: Any, message: str) -> None:
    model = wrapped()
    zo = ZOAdam(model, lr=0.01)
    step(model, zo)
    state = copy.deepcopy(zo.state_dict())
    kept = copy.deepcopy(zo.state_dict()["state"])
    damage(state)
    with pytest.raises(ValueError, match=message):
        zo.load_state_dict(state)
    now = zo.state_dict()["state"]
    assert all(torch.equal(kept[i][k], now[i][k]) for i in kept for k in kept[i])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, p: ZOAdam(m, 0.01, [{"params": p, "betas": (1.5, 0.9)}]), r"betas\[0\] must be"),
        (lambda m, p: ZOAdam(m, 0.01, betas=0.9), "betas must be two numbers, got 0.9"),  # type: ignore[arg-type]
        (
            lambda m, p: ZOSGD(m, 0.01, [{"params": p, "momentum": -3.0}], momentum=0.9),
            "momentum must",
        ),
        (lambda m, p: ElasticZO(m.module, 0, estimator=low_rank), "estimator must be one of"),  # type: ignore[arg-type]
    ],
)
def test_settings_of_groups_are_checked(make: Any, message: str) -> None:
    model = wrapped()
    with pytest.raises((ValueError, TypeError), match=message):
        make(model, [next(model.head_parameters())])


def test_groups_do_not_grow_under_a_log(tmp_path: Path) -> None:
    model = wrapped()
    zo = ZOSGD(model, lr=0.01, groups=[{"params": [next(model.head_parameters())]}])
    TrajectoryLog(tmp_path / "log", zo)
    with pytest.raises(RuntimeError, match="a log is attached"):
        zo.add_param_group({"params": [], "lr": 0.1})


@pytest.mark.parametrize("defer", [False, True])
def test_state_follows_a_cast_of_the_model(defer: bool) -> None:
    model = wrapped()
    zo = ZOAdam(model, lr=0.01, defer=defer)
    step(model, zo)
    model.double()
    step(model, zo)
    model.flush()
    assert {t.dtype for s in zo.state.values() for k, t in s.items() if k != "step"} == {
        torch.float64
    }


def test_adam_warns_of_squares_that_bfloat16_cannot_hold(recwarn: pytest.WarningsRecorder) -> None:
    ZOAdam(wrapped().bfloat16(), lr=0.01)
    assert "beta2=0.999 keeps squares longer than bfloat16" in str(recwarn.pop(UserWarning).message)
    ZOAdam(wrapped().bfloat16(), lr=0.01, betas=(0.9, 0.99))
    ZOAdam(wrapped(), lr=0.01)
    assert not [w for w in recwarn if "keeps squares" in str(w.message)]


def test_memory_knows_the_state_of_the_head() -> None:
    model = wrapped()
    numbers = sum(p.numel() for p in model.head_parameters())
    none, one, two = (
        training_memory(model, X, rule=rule).steady.parts.get("optimizer", 0)
        for rule in ("sgd", "momentum", "adam")
    )
    assert (none, one, two) == (0, 4 * numbers, 8 * numbers)
