"""One owner of a step's state: a tensor that is listed is moved, reset, saved and put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from elasticzo import ZOSGD, ElasticZO
from elasticzo.session import TENSORS, Kept, Session


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> tuple[ElasticZO, ZOSGD, Session]:
    # The one line.
    monkeypatch.setitem(TENSORS, "ema", Kept(torch.float32, 0.5, reset=True, saved="ema"))
    monkeypatch.setitem(TENSORS, "seen_losses", Kept(torch.int64, saved="seen_losses"))
    model = ElasticZO(nn.Sequential(nn.Linear(3, 2)), tail=0).train()
    return model, ZOSGD(model, lr=0.1), model.session


def test_a_tensor_of_a_step_is_one_line(wrapped: tuple[ElasticZO, ZOSGD, Session]) -> None:
    model, zo, session = wrapped
    ema, seen = session.ema, session.seen_losses  # type: ignore[attr-defined]
    with session.untouched():
        ema.fill_(3.0)
        seen.fill_(4)
    assert (float(ema), int(seen)) == (0.5, 0)
    ema.fill_(3.0)
    seen.fill_(4)
    model(torch.randn(5, 3))
    zo.step([1.0, 2.0])
    assert (float(ema), int(seen)) == (0.0, 4)  # one belongs to a step, the other to the run
    assert session.ema is ema  # type: ignore[attr-defined]  # a captured step reads this address


def test_it_is_saved_copied_and_moved(wrapped: tuple[ElasticZO, ZOSGD, Session]) -> None:
    model, zo, session = wrapped
    session.seen_losses.fill_(7)  # type: ignore[attr-defined]
    session.ema.fill_(0.25)  # type: ignore[attr-defined]
    state = zo.state_dict()
    assert state["zo"]["seen_losses"] == 7 and state["zo"]["ema"] == 0.25
    other = copy.deepcopy(model).session
    assert int(other.seen_losses) == 7  # type: ignore[attr-defined]
    session.seen_losses.fill_(0)  # type: ignore[attr-defined]
    zo.load_state_dict(state)
    assert int(session.seen_losses) == 7  # type: ignore[attr-defined]
    model.to("meta")  # weights without values: the seed waits on the CPU for others
    assert {t.device.type for t in session.tensors()} == {"cpu"}
    model.moved(torch.device("meta"))
    assert {t.device.type for t in session.tensors()} == {"meta"}


def test_a_damaged_entry_is_refused(wrapped: tuple[ElasticZO, ZOSGD, Session]) -> None:
    _, zo, _ = wrapped
    state = zo.state_dict()
    state["zo"] = state["zo"] | {"seen_losses": -1}
    with pytest.raises(ValueError, match=r"seen_losses must be an integer in \[0, 2\^63\)"):
        zo.load_state_dict(state)
