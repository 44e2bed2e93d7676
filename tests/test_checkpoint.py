"""Checkpoints: whole or not at all, and a clear word about every other file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elasticzo.checkpoint import load_checkpoint, save_checkpoint
from elasticzo.data import epoch_order


def make_state() -> dict[str, Any]:
    return {
        "weights": {"w": torch.randn(3, 4), "b": torch.randn(4).bfloat16()},
        "none": torch.zeros(0, 3),
        "count": torch.tensor(7),
        "optimizer": {0: {"step": torch.tensor(3.0)}},
        "numbers": [1, 2.5, True, None, "text"],
        "transposed": torch.arange(6).reshape(2, 3).t(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_round_trip(tmp_path: Path) -> None:
    path, state = tmp_path / "c.pt", make_state()
    save_checkpoint(path, state)
    assert same(state, load_checkpoint(path))
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"loss": np.float64(0.5)})
    assert load_checkpoint(path) == {"loss": 0.5}
    with pytest.raises(TypeError, match=r"keys of state must be strings or integers, got 1.5"):
        save_checkpoint(path, {1.5: 0})  # type: ignore[dict-item]
    assert load_checkpoint(path) == {"loss": 0.5}


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                save_checkpoint(path, {"step": 2})
        assert load_checkpoint(path) == {"step": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_objects_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] must be .*, got PosixPath"):
        save_checkpoint(path, {"a": [1, tmp_path]})
    assert not any(tmp_path.iterdir())


def test_damage_is_noticed_everywhere(tmp_path: Path) -> None:
    """Cut off at any length or with any byte inverted: ValueError, or the very same state."""
    path, state = tmp_path / "c.pt", make_state()
    save_checkpoint(path, state)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c\.pt is "):
            load_checkpoint(path)
    refused = 0
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert same(state, load_checkpoint(path))  # padding, or names inside the archive
        except ValueError as error:
            assert "c.pt" in str(error)
            refused += 1
    assert refused > 20


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=r"c\.pt: no such checkpoint"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"c\.pt is not a checkpoint, or is damaged"):
        load_checkpoint(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected format 'elasticzo-checkpoint'"):
        load_checkpoint(path)
    content = {"format": "elasticzo-checkpoint", "version": 99, "digest": "", "state": {}}
    torch.save(content, path)
    with pytest.raises(ValueError, match="expected checkpoint version 1, got 99"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "elasticzo-checkpoint", "version": 1, "state": Evil()}, "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is not a checkpoint"):
        load_checkpoint("c.pt")
    assert not Path("evil").exists()


def test_epoch_order() -> None:
    """A permutation, another one each epoch and seed, the same for ever, uniform over places."""
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(1000))
    fixed = [(a == b).sum().item() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(fixed) < 12  # equal places are Poisson(1)
    assert epoch_order(8, 0, 0).tolist() == [4, 7, 3, 6, 1, 0, 2, 5]  # by a Philox written apart
    first = torch.stack([epoch_order(4, seed, 5)[0] for seed in range(2000)])
    counts = first.bincount(minlength=4)
    assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize(
    "arguments", [(0, 0, 0), (3, -1, 0), (3, 1 << 63, 0), (3, 0, -1), (3, 0, 1 << 32)]
)
def test_epoch_order_refuses(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be .*, got"):
        epoch_order(*arguments)
