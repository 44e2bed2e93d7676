"""Random networks hold what must hold of all; the checks see what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from elasticzo import ZOSGD, ElasticZO
from elasticzo.forward.staging import Staging
from experiments.studies import fuzz
from experiments.studies.fuzz_checks import Broken, check_case
from experiments.studies.fuzz_networks import make_case

PARTS, EACH = 12, 25  # 300 networks


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    torch.set_num_threads(1)
    outcomes = [check_case(make_case(seed)) for seed in range(part * EACH, (part + 1) * EACH)]
    assert outcomes.count("held") >= 0.8 * EACH, outcomes  # others are refused, in a sentence


def test_a_seed_is_a_network() -> None:
    one, other = make_case(3), make_case(3)
    assert str(one) == str(other) and torch.equal(one.x, other.x)
    assert all(map(torch.equal, one.net.parameters(), other.net.parameters()))
    assert len({str(make_case(seed)).partition(":")[2] for seed in range(50)}) > 45


def scaled(before: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: before(*args, **kwargs) * (1 + 1e-6)


def stays(before: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, state: before(self, copy.deepcopy(state) | {"step": state["step"] + 1})


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "by_hand": (Staging, "weights", scaled),
    "resumed and replayed": (ZOSGD, "load_state_dict", stays),
}


@pytest.mark.parametrize("invariant", FAULTS)
def test_the_checks_see_a_fault(invariant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, spoil = FAULTS[invariant]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    with pytest.raises(Broken, match=f"^{invariant} of seed"):
        for seed in range(10):
            check_case(make_case(seed))


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz.main(["--count", "2", "--seed", "10"]) == 0
    assert "2 held, 0 refused, 0 broken" in capsys.readouterr().out
    assert fuzz.main(["--count", "0"]) == 2
    assert "count must be at least 1, got 0" in capsys.readouterr().err
    evaluated = ElasticZO.eval

    def moved(model: ElasticZO) -> ElasticZO:
        next(model.parameters()).data.mul_(2)
        return evaluated(model)

    monkeypatch.setattr(ElasticZO, "eval", moved)
    assert fuzz.main(["--count", "1", "--seed", "10"]) == 1
    out = capsys.readouterr().out
    assert "forwards move nothing of seed 10: " in out and "0 held, 0 refused, 1 broken" in out
