"""No tensor of a step is floating; checkpoints, resuming and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elasticzo.checkpoint import load_checkpoint, save_checkpoint
from elasticzo.int8 import (
    ElasticZOInt8,
    Int8Tensor,
    Int8TrajectoryLog,
    Int8ZO,
    replay_int8,
)
from tests.elasticzo.int8.nets import batch, digest, fixed_weights, lenet, one_step, small_net

pytestmark = pytest.mark.filterwarnings("error")


class NoFloat(TorchDispatchMode):
    """Fails on any operator that takes or makes a floating tensor; counts the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                raise AssertionError(f"{func} has a tensor of {leaf.dtype}")
        self.seen += 1
        return out


def make(tail: Any, **settings: Any) -> tuple[ElasticZOInt8, Int8ZO, Any]:
    model = ElasticZOInt8(
        fixed_weights(small_net()), tail=tail, r_max=9, p_zero=0.3, queries=2, **settings
    )
    return model, Int8ZO(model, b_zo=3), model.tail_optimizer(b_bp=3)


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("tail", [0, 1, 2, "all"], ids=["full-zo", "cls2", "cls1", "full-bp"])
def test_no_float_in_a_step(tail: Any, pairing: str, backend: str, tmp_path: Path) -> None:
    model, zo, bp = make(tail, pairing=pairing, backend=backend)
    batches = [batch((3, 1, 8, 8), 4, i) for i in range(2)]
    log = Int8TrajectoryLog(tmp_path / "log.jsonl", zo)
    step = one_step if tail else head_step
    step(model, zo, bp, *batches[0], "mean")
    with NoFloat() as watch:
        step(model, zo, bp, *batches[1], "mean")
        log.drain()
    assert watch.seen > 20


def head_step(
    model: ElasticZOInt8, zo: Int8ZO, bp: Any, x: Int8Tensor, y: Tensor, source: str
) -> None:
    zo.step(model.losses(model(x), y))


def test_the_watch_sees_floats() -> None:
    model, *_ = make(1, loss="float")
    x, y = batch((3, 1, 8, 8), 4)
    with pytest.raises(AssertionError, match=r"has a tensor of torch.float64"), NoFloat():
        model.losses(model(x), y)


def test_evaluation_has_no_float_either() -> None:
    model = lenet().eval()
    with NoFloat() as watch:
        model(batch((2, 1, 28, 28), 10)[0])
    assert watch.seen > 5


@pytest.mark.parametrize("tail", [0, 1, "all"], ids=["full-zo", "cls2", "full-bp"])
def test_resumes_to_the_bit(tail: Any, tmp_path: Path) -> None:
    batches = [batch((3, 1, 8, 8), 4, i) for i in range(8)]
    step = one_step if tail else head_step

    def go(run: tuple[Any, Any, Any], first: int, last: int) -> None:
        model, zo, bp = run
        for i in range(first, last):
            model.set_noise(r_max=9 - i, p_zero=0.1 * i)
            zo.b_zo = 3 - i // 4
            step(model, zo, bp, *batches[i], "plus")

    whole = make(tail)
    go(whole, 0, 8)
    begun = make(tail)
    go(begun, 0, 4)
    model, zo, bp = begun
    state = {"model": model.state_dict(), "zo": zo.state_dict(), "bp": bp.state_dict()}
    save_checkpoint(tmp_path / "c.pt", state)
    state = load_checkpoint(tmp_path / "c.pt")
    model, zo, bp = resumed = make(tail, seed=99)
    model.load_state_dict(state["model"])
    zo.load_state_dict(state["zo"])
    bp.load_state_dict(state["bp"])
    assert (model.seed, model.step_index, model.r_max, zo.b_zo) == (0, 4, 6, 3)
    go(resumed, 4, 8)
    assert digest(resumed[0]) == digest(whole[0]) != digest(begun[0])


def test_a_state_of_other_settings_is_refused() -> None:
    model, zo, bp = make(1)
    other = Int8ZO(ElasticZOInt8(small_net(), tail=1, fraction_bits=8), b_zo=1)
    message = "the saved run differs: queries was 2, is 1; fraction_bits was 12, is 8"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(zo.state_dict())
    with pytest.raises(ValueError, match="rounding was 'pseudo', is 'nearest'"):
        model.tail_optimizer(b_bp=1, rounding="nearest").load_state_dict(bp.state_dict())


@pytest.mark.parametrize("logged", ["numba", "reference"])
def test_replay_rebuilds_the_head(logged: str, tmp_path: Path) -> None:
    """Also on another backend than that of the run."""
    pytest.importorskip("numba")
    path = tmp_path / "log.jsonl"
    model, zo, bp = make(1, backend=logged)
    log = Int8TrajectoryLog(path, zo, capacity=3)
    for i in range(5):
        model.set_noise(r_max=5 + i, p_zero=0.1 * i)
        zo.b_zo = 1 + i % 3
        one_step(model, zo, bp, *batch((3, 1, 8, 8), 4, i))
    assert len(path.read_text().splitlines()) == 1 + 3  # the ring was full, and drained by itself
    log.drain()
    for backend in ("numba", "reference"):
        fresh, *_ = make(1, backend=backend)
        assert replay_int8(path, fresh) == 5 == fresh.step_index
        for (_, a), (_, b) in zip(
            fresh.named_head_parameters(), model.named_head_parameters(), strict=True
        ):
            assert torch.equal(a, b)
    fresh, *_ = make(1)
    assert replay_int8(path, fresh, steps=2) == 2
    assert "".join(path.read_text().splitlines()[0]).count("elasticzo-int8-trajectory-2") == 1


def test_log_goes_on_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    model, zo, bp = make(1)
    log = Int8TrajectoryLog(path, zo)
    for i in range(3):
        one_step(model, zo, bp, *batch((3, 1, 8, 8), 4, i))
    log.drain()
    model.go_to(0, 2)  # a checkpoint before the last record
    log = Int8TrajectoryLog(path, zo, resume=True)
    one_step(model, zo, bp, *batch((3, 1, 8, 8), 4, 2))
    log.drain()
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(FileExistsError, match="give another path, or resume=True"):
        Int8TrajectoryLog(path, zo)
    with pytest.raises(ValueError, match=r"capacity must be an integer in \[1, 2\^24\], got 0"):
        Int8TrajectoryLog(tmp_path / "other", zo, capacity=0)
    other = Int8ZO(ElasticZOInt8(small_net(), tail=1, seed=1), b_zo=1)
    with pytest.raises(
        ValueError,
        match="log of another run: seed, queries, first_weights, exponents",
    ):
        Int8TrajectoryLog(path, other, resume=True)
    with pytest.raises(ValueError, match=r"the log updates .+, which is not in this model's head"):
        replay_int8(path, make(2)[0])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(ValueError, match="line 3 is corrupt, it does not match its checksum"):
        replay_int8(path, make(1)[0])
