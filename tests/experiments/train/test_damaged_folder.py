"""The folder of a run: damage is named with the way out; so are other samples, another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.files import read_checked, write_checked
from experiments.train import data, environment
from experiments.train.config import TrainConfig
from experiments.train.folder import CHECKPOINT, CONFIG, METRICS, RESULT, RunFolder, metrics_of
from experiments.train.report import Reporter
from experiments.train.run import Run

Start = Callable[..., tuple[dict[str, Any], RunFolder]]
ONE = {"epochs": 1, "trajectory": False}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Stopped(Exception):
    pass


def cut_short(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stopped at its first checkpoint."""

    def save(self: RunFolder, state: dict[str, Any]) -> None:
        saved(self, state)
        raise Stopped

    saved = RunFolder.save
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        with pytest.raises(Stopped):
            Run(replace(config, checkpoint_steps=10)).go()


def test_every_flipped_bit_of_a_result_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / RESULT
    result = {"test_accuracy": 91.25, "loss": float("nan"), "of": ("a", {"b": 1e-300}), "n": None}
    write_checked(path, result)
    wanted = {"test_accuracy": 91.25, "loss": None, "of": ["a", {"b": 1e-300}], "n": None}
    assert read_checked(path, "way out") == wanted
    content = path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:  # a blank may become another one
            assert read_checked(path, "way out") == wanted
        except ValueError as error:
            assert str(path) in str(error) and "way out" in str(error)


def test_a_damaged_result_is_named_and_made_again(start: Start) -> None:
    result, folder = start(**ONE)
    content = (folder.path / RESULT).read_text()
    old = content.replace('"digest"', '"digesu"')
    for damaged in (content.replace('"test_accuracy": ', '"test_accuracy": 1'), old, "{}", "["):
        (folder.path / RESULT).write_text(damaged)
        with pytest.raises(ValueError, match=r"result.json .*delete it and give the same command"):
            start(**ONE)
    (folder.path / RESULT).unlink()
    again, _ = start(**ONE)
    apart = ("peak_memory", "seconds")
    assert {k: v for k, v in again.items() if k not in apart} == {
        k: v for k, v in result.items() if k not in apart
    }


def test_a_damaged_configuration_is_named(start: Start) -> None:
    _, folder = start(**ONE)
    for name in (CHECKPOINT, RESULT):
        (folder.path / name).unlink()
    for damaged in ("{}", "[]", (folder.path / CONFIG).read_text().replace("cls2", "cls1", 1)):
        (folder.path / CONFIG).write_text(damaged)
        with pytest.raises(ValueError, match=r"config.json .*the run begins anew"):
            start(**ONE)
    (folder.path / CONFIG).unlink()
    assert start(**ONE)[0]["steps"] == 24


def test_damaged_metrics_are_named(
    start: Start, small: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = start(**ONE)
    path = folder.path / METRICS
    assert len(metrics_of(folder.path, "test")) == 1
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"test_loss": ', b'"test_loss": 7'))
    with pytest.raises(ValueError, match=r"metrics.jsonl does not match its digest in result.json"):
        metrics_of(folder.path, "test")
    other = replace(small, **ONE, out=tmp_path / "other")
    cut_short(other, monkeypatch)
    path = tmp_path / "other" / METRICS
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"loss"', b'"loss,', 1))
    with pytest.raises(ValueError, match=r"metrics.jsonl does not match its digest in the check"):
        Run(other).go()
    path.write_bytes(content)
    Run(other).go()


def test_other_samples_are_refused(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(small, **ONE)
    cut_short(config, monkeypatch)
    run = Run(config)
    read = data._read

    def other(*key: Any) -> Any:
        found = read(*key)
        return replace(found, train_y=found.train_y.where(found.train_y != 3, 4))

    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_read", other)
        with pytest.raises(ValueError, match=r"holds a run on other samples \(digest .*another"):
            run.go()
        (tmp_path / "run" / CHECKPOINT).unlink()  # nor before there was a checkpoint
        with pytest.raises(ValueError, match="holds a run on other samples"):
            Run(config).go()
    (tmp_path / "run" / CHECKPOINT).write_bytes(before)
    assert Run(config).go()["data"] == Run(config).folder.data


def test_another_machine_is_told(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(small, **ONE)
    cut_short(config, monkeypatch)
    torch.set_num_threads(1)
    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        patch.setattr(environment, "_processor", lambda: "another one")
        run = Run(config, reporter=notes)
        with pytest.raises(Stopped):
            patch.setattr(run, "_train", lambda: (_ for _ in ()).throw(Stopped()))
            run.go()
    (warning,) = [n for n in notes.notes if n.startswith("warning")]
    assert "hardware from" in warning and "to another one, 1 threads" in warning
    assert "cpu_capability from" in warning and "to DEFAULT" in warning
    notes = Notes()
    Run(config, reporter=notes).go()
    assert not [n for n in notes.notes if n.startswith("warning")]
