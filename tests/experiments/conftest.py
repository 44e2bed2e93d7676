"""Shared by the tests of the experiments: short runs on the digits, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

from experiments.train.config import TrainConfig
from experiments.train.folder import RunFolder
from experiments.train.run import Run

OF_CLOUDS = ("points", "augment", "batch_norm")  # fields that mean nothing to images
Start = Callable[..., tuple[dict[str, Any], RunFolder]]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run sets torch's threads: other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path: Path) -> TrainConfig:
    """Two epochs of 24 steps of ZO-Feat-Cls2, without pictures."""
    return TrainConfig(
        epochs=2,
        batch_size=32,
        train_images=768,
        threads=1,
        device="cpu",
        out=tmp_path / "run",
        log_steps=6,
        tensorboard=False,
        plot=False,
    )


@pytest.fixture
def start(small: TrainConfig) -> Start:
    """Runs the small configuration with changes; the result and the folder."""

    def run(**changes: Any) -> tuple[dict[str, Any], RunFolder]:
        started = Run(replace(small, **changes))
        return started.go(), started.folder

    return run
