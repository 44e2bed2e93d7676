"""States of `ZOSGD`: what is wrong is named, and nothing of it is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO

X = torch.ones(3, 4)


def make(seed: int = 0, lr: float | Tensor = 0.1) -> ZOSGD:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model = ElasticZO(net, tail=1, seed=seed).train()
    groups = [{"params": [net[0].weight], "weight_decay": 0.5}]
    return ZOSGD(model, lr=lr, groups=groups, clip=2.0)


def trained() -> ZOSGD:
    zo = make(seed=5, lr=0.3)
    for losses in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])):
        zo.model(X)
        zo.step(losses)
    return zo


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seed": None}, r"'zo' must have the entries seed, step, .*; got one without seed$"),
    ({"clip": None, "lr": 1}, r"got one without clip and with 'lr'$"),
    ({"step": -1}, r"step must be an integer in \[0, 2\^63\), got -1"),
    ({"step": 2.0}, r"step must be an integer in \[0, 2\^63\), got 2.0"),
    ({"seed": 1 << 63}, r"seed must be an integer in \[0, 2\^63\)"),
    ({"skipped": "1"}, r"skipped must be an integer in \[0, 2\^63\), got '1'"),
    ({"eps": 0.5, "queries": 3}, "differs: eps was 0.5, is 0.001; queries was 3, is 1$"),
    ({"eps": torch.ones(2)}, "differs: eps was tensor"),
    ({"scale": {"0.weight": 1.0}}, r"differs: scale was \{'0.weight': 1.0\}, is \{.*'0.bias'"),
]
GROUPS: list[tuple[Any, str]] = [
    (None, "param_groups of a state of ZOSGD must be a list, got None"),
    ([None, None], r"param_groups\[0\], must be a dictionary, got NoneType"),
    ([{"params": []}], r"param_groups\[0\], must have .*; got one without lr, weight_decay$"),
    ([{"params": 0, "lr": 1.0, "weight_decay": 0.0}], r"params of param_groups\[0\] must be a li"),
    ([{"params": [0], "lr": 1.0, "weight_decay": 0.0}], "different number of parameter groups"),
    (
        [{"params": [0, 1], "lr": 1.0, "weight_decay": 0.0}] * 2,
        "doesn't match the size of optimizer's group",
    ),
    *(
        ([{"params": [0], "lr": bad, "weight_decay": 0.0}] * 2, r"0-d tensors >= 0, got .* and 0.0")
        for bad in (-1.0, float("nan"), "1", True, torch.ones(2), torch.tensor(-1.0))
    ),
]
CASES = [
    *((lambda s, c=c: {**s, "zo": {**s["zo"], **c}}, m, str(c)) for c, m in WRONG),
    *((lambda s, g=g: {**s, "param_groups": g}, m, str(g)) for g, m in GROUPS),
    (lambda s: {**s, "zo": None}, "under 'zo' must be a dictionary, got NoneType", "no zo"),
    (lambda s: {**s, "state": {0: {"step": 1}}}, "differs: state was {0: .*, is {}$", "state"),
    (lambda s: {k: v for k, v in s.items() if k == "zo"}, "without state, param_groups$", "zo"),
    (lambda s: {}, "must have the entries state, param_groups, zo; got one without st", "empty"),
    (lambda s: None, "a state of ZOSGD must be a dictionary, got NoneType", "none"),
]


@pytest.mark.parametrize(
    ("change", "message"), [c[:2] for c in CASES], ids=[c[2][:40] for c in CASES]
)
def test_wrong_states_are_refused_and_load_nothing(change: Any, message: str) -> None:
    saved = trained().state_dict()
    bad = change(copy.deepcopy(saved))
    if isinstance(bad, dict) and isinstance(bad.get("zo"), dict):
        bad["zo"] = {k: v for k, v in bad["zo"].items() if v is not None}
    zo = make()
    before = copy.deepcopy(zo.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        zo.load_state_dict(bad)
    assert zo.state_dict() == before
    zo.load_state_dict(saved)
    assert zo.state_dict() == saved
    assert (zo.model.seed, zo.model.step_index, zo.skipped) == (5, 2, 1)


def test_what_schedules_and_hooks_add_is_theirs() -> None:
    source = trained()
    schedule = torch.optim.lr_scheduler.OneCycleLR(source, 0.5, 10, cycle_momentum=False)
    source.register_state_dict_post_hook(lambda zo, state: {**state, "mine": 1})
    zo = make()
    zo.load_state_dict(source.state_dict())
    assert [g["max_lr"] for g in zo.param_groups] == [0.5, 0.5]
    assert zo.param_groups[0]["lr"] == schedule.get_last_lr()[0]
