"""Checkpoints: whole or not at all, and a clear word about every other file."""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict
from http import HTTPStatus
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


@pytest.mark.parametrize("value", [Evil(), torch.nn.Linear(2, 2)], ids=["call", "module"])
def test_no_refusal_tells_how_to_turn_the_protection_off(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"format": "elasticzo-checkpoint", "version": 1, "state": value}, path)
    with pytest.raises(ValueError, match=r"it asks for [\w.]+; nothing but tensors") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_derived_values_are_written_as_their_base(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state = {
        np.str_("key"): torch.__version__,
        "name": np.str_("adam"),
        "status": HTTPStatus.OK,
        HTTPStatus.CREATED: True,
        "half": np.float64(0.5),
        "weight": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(a=1),
    }
    save_checkpoint(path, state)
    found = load_checkpoint(path)
    assert found.pop("weight").tolist() == [1.0, 1.0]
    plain = {"key": str(torch.__version__), "name": "adam", "status": 200, 201: True}
    assert same(found, {**plain, "half": 0.5, "ordered": {"a": 1}})
    assert [type(k) for k in found] == [str, str, str, int, str, str]


def test_a_view_is_written_without_what_is_around_it(tmp_path: Path) -> None:
    path, large = tmp_path / "c.pt", torch.randn(1000, 1000)
    save_checkpoint(
        path, {"row": large[:1], "column": large[:, 3], "conj": large[:1].cfloat().conj()}
    )
    assert path.stat().st_size < 30_000
    found = load_checkpoint(path)
    assert torch.equal(found["row"], large[:1]) and torch.equal(found["column"], large[:, 3])


@pytest.mark.parametrize(
    ("t", "kind"),
    [(torch.eye(2).to_sparse(), "sparse_coo"), (torch.ones(2, device="meta"), "meta")],
)
def test_tensors_that_are_not_dense_are_refused(t: torch.Tensor, kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"state\['t'\] must be a dense tensor .*{kind}"):
        save_checkpoint(tmp_path / "c.pt", {"t": t})
    assert not any(tmp_path.iterdir())


def test_two_writers_of_one_path(tmp_path: Path) -> None:
    path, failed = tmp_path / "c.pt", []

    def save(number: int) -> None:
        for _ in range(20):
            try:
                save_checkpoint(path, {"t": torch.full((5000,), number)})
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert load_checkpoint(path)["t"].unique().numel() == 1


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system refuses the write in the middle."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, {"t": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


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
