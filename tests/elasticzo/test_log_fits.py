"""A log is replayed onto the model and the weights it began with, and as it was written: anything
else is refused before anything moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses, read_trajectory, replay
from elasticzo.int8 import ElasticZOInt8, Int8ZO
from elasticzo.lines import append, from_lines, to_lines
from tests.elasticzo.int8.nets import batch, fixed_weights, small_net

X, Y = torch.linspace(-1, 1, 30).view(5, 6), torch.tensor([0, 1, 2, 0, 1])


def net(seed: int = 0, hidden: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def floats(model: nn.Module | None = None, **settings: Any) -> ElasticZO:
    return ElasticZO(model or net(), **{"tail": 1, "eps": 1e-2, **settings}).train()


def integers(change: int = 0, tail: Any = 0) -> ElasticZOInt8:
    model = ElasticZOInt8(fixed_weights(small_net()), tail=tail, r_max=9, backend="reference")
    next(model.head_parameters()).view(-1)[0] += change
    return model


def learn(model: Any, zo: Any, count: int) -> None:
    for i in range(count):
        if model.integer:
            x, y = batch((3, 1, 8, 8), 4, i)
            zo.step(model.losses(model(x), y))
        else:
            zo.step(pair_losses(F.cross_entropy, model(X), Y))


def optimizer(model: Any) -> Any:
    return Int8ZO(model, b_zo=3) if model.integer else ZOSGD(model, lr=0.1)


def head(model: Any) -> list[Tensor]:
    return [w.detach().clone() for w in model.head_parameters()]


def logged(path: Path, model: Any, steps: int = 4) -> list[Tensor]:
    """The head at the end of a run that is logged."""
    zo = optimizer(model)
    log = TrajectoryLog(path, zo)
    learn(model, zo, steps)
    log.drain()
    return head(model)


def refused(path: Path, model: Any, message: str, **given: Any) -> None:
    before, place = head(model), model.step_index
    with pytest.raises(ValueError, match=message):
        replay(path, model, **given)
    assert all(map(torch.equal, before, head(model))) and model.step_index == place


ANOTHER: dict[str, tuple[Callable[[], Any], str]] = {
    "values": (lambda: floats(net(1)), "'0.weight' has other values than it had at step 0"),
    "shapes": (lambda: floats(net(0, 9)), r"shape of '0.weight' was \[8, 6\], is \[9, 6\]"),
    "dtype": (lambda: floats(net().double()), "dtype of '0.weight' was float32, is float64"),
    "larger": (lambda: floats(tail=0), "head has '2.weight', which the log does not update"),
    "smaller": (lambda: floats(tail="all"), "the log updates '0.weight', which is not in"),
    "scale": (lambda: floats(scale={"*": 0.5}), "scale of '0.weight' was 1.0, is 0.5"),
    "eps": (lambda: floats(eps=1e-3), "the log is of another model: eps differ"),
}


@pytest.mark.parametrize("other", ANOTHER)
def test_another_model_is_refused(other: str, tmp_path: Path) -> None:
    make, message = ANOTHER[other]
    logged(tmp_path / "log", floats())
    model = make()
    model.session.skips.fill_(3)
    refused(tmp_path / "log", model, message)
    assert int(model.session.skips) == 3


def test_another_integer_model_is_refused(tmp_path: Path) -> None:
    want = logged(tmp_path / "log", integers())
    refused(tmp_path / "log", integers(change=1), "has other values than it had at step 0")
    refused(tmp_path / "log", integers(tail=1), "which is not in this model's head")
    scaled = integers()
    scaled.head.slots[0].module.get_buffer("exponent").add_(1)
    refused(tmp_path / "log", scaled, "the log is of another model: exponents was")
    again = integers()
    assert replay(tmp_path / "log", again) == 4
    assert all(map(torch.equal, want, head(again)))


def test_a_log_that_begins_later_is_of_the_weights_there(tmp_path: Path) -> None:
    model = floats()
    zo = optimizer(model)
    learn(model, zo, 2)
    middle = floats(net(7))
    middle.load_state_dict(model.state_dict())
    log = TrajectoryLog(tmp_path / "log", zo, resume=True)
    learn(model, zo, 3)
    log.drain()
    refused(tmp_path / "log", floats(), "other values than it had at step 2, where the log begins")
    refused(tmp_path / "log", model, "other values than it had at step 2")
    assert replay(tmp_path / "log", middle) == 5
    assert all(map(torch.equal, head(model), head(middle)))


@pytest.mark.parametrize("make", [floats, integers], ids=["floats", "integers"])
def test_every_flipped_bit_is_noticed(make: Callable[[], Any], tmp_path: Path) -> None:
    """Every byte, one bit of each: none is read as another run."""
    logged(tmp_path / "log", make(), steps=2)
    content, flipped = (tmp_path / "log").read_bytes(), tmp_path / "flipped"
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        flipped.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is corrupt|is not a trajectory log"):
            read_trajectory(flipped)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "digit": (lambda b: b.replace(b'"losses": [1', b'"losses": [2', 1), "line 2 is corrupt"),
    "key": (lambda b: b.replace(b'"skipped"', b'"skippud"', 1), "line 2 is corrupt"),
    "no utf-8": (lambda b: b.replace(b'"lr"', b'"l\xf2"', 1), "line 2 is corrupt"),
    "header": (lambda b: b.replace(b'"seed": 0', b'"seed": 1', 1), "line 1 is corrupt"),
    "lost line": (lambda b: b"\n".join([*b.split(b"\n")[:2], *b.split(b"\n")[3:]]), "line 3 is"),
    "line twice": (lambda b: b + b.split(b"\n")[-2] + b"\n", "line 6 is corrupt"),
    "no checksums": (lambda b: _plain(b), "line 1 is corrupt"),
    "old": (
        lambda b: _plain(b).replace(b"trajectory-2", b"trajectory-1"),
        "is a log of format 'elasticzo-trajectory-1', without checksums",
    ),
}


def _plain(content: bytes) -> bytes:
    records = [json.loads(line) for line in content.splitlines()]
    return b"".join(
        json.dumps({k: v for k, v in r.items() if k != "check"}).encode() + b"\n" for r in records
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    logged(tmp_path / "log", floats())
    content = (tmp_path / "log").read_bytes()
    damaged = change(content)
    assert damaged != content
    (tmp_path / "log").write_bytes(damaged)
    refused(tmp_path / "log", floats(), message)
    with pytest.raises(ValueError, match=message):  # nor is it gone on with
        TrajectoryLog(tmp_path / "log", optimizer(floats()), resume=True)


@pytest.mark.parametrize("make", [floats, integers], ids=["floats", "integers"])
def test_a_log_that_was_cut_off_gives_the_records_before(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    logged(tmp_path / "log", make())
    content, cut = (tmp_path / "log").read_bytes(), tmp_path / "cut"
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(ends[2] + 1, len(content), 7):
        cut.write_bytes(content[:size])
        whole = sum(end < size for end in ends) - 1
        records = read_trajectory(cut)[1]
        assert [r["step"] for r in records] == list(range(whole))
        assert replay(cut, make()) == whole
    model = make()
    zo = optimizer(model)
    learn(model, zo, 2)
    log = TrajectoryLog(cut, zo, resume=True)  # it goes on behind a cut
    learn(model, zo, 1)
    log.drain()
    assert replay(cut, make()) == 3


def test_steps_that_a_log_does_not_have(tmp_path: Path) -> None:
    logged(tmp_path / "log", floats())
    refused(tmp_path / "log", floats(), r"steps of .* must be an .* \[0, 4\], got 5", steps=5)
    refused(tmp_path / "log", floats(), r"must be an integer in \[0, 4\], got -1", steps=-1)


def test_a_gap_is_found_before_anything_moves(tmp_path: Path) -> None:
    model = floats()
    zo = optimizer(model)
    log = TrajectoryLog(tmp_path / "log", zo)
    learn(model, zo, 1)
    zo.attach(None)
    learn(model, zo, 1)
    zo.attach(log)
    learn(model, zo, 1)
    log.drain()
    refused(tmp_path / "log", floats(), "step 1 is missing, found 2")


@pytest.mark.parametrize("batches", [[X], [X, X[:, :2], X, X]], ids=["too few", "other shape"])
def test_batches_that_do_not_serve_move_nothing(batches: list[Tensor], tmp_path: Path) -> None:
    model, fresh = (
        floats(nn.Sequential(nn.BatchNorm1d(6), *net()), directions="node") for _ in range(2)
    )
    model.settle(X)
    zo = optimizer(model)
    log = TrajectoryLog(tmp_path / "log", zo)
    for _ in range(4):
        zo.step(pair_losses(F.cross_entropy, model(X), Y, reduction=model.reduction))
    log.drain()
    before = [t.clone() for t in fresh.state_dict().values()]
    with pytest.raises((ValueError, RuntimeError)):
        replay(log.path, fresh, batches=batches)
    assert all(map(torch.equal, before, fresh.state_dict().values()))
    assert replay(log.path, fresh, batches=[X] * 4) == 4
    assert all(map(torch.equal, head(model), head(fresh)))


def test_lines_that_could_not_be_written_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    lines, check = to_lines([{"a": 1}])
    path.write_bytes(lines)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    more, _ = to_lines([{"a": 2}], check)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            append(path, more)
    assert path.read_bytes() == lines
    append(path, more)
    assert from_lines(path)[0] == [{"a": 1}, {"a": 2}]
