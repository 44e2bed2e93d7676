"""The samples of a run: read once, turned, split and counted as its configuration says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from elasticzo.data import (
    CLOUD_SETS,
    CloudData,
    ImageData,
    load_clouds,
    load_images,
    rotate_images,
    shuffled,
)
from elasticzo.digest import digest
from experiments.train.config import TrainConfig

Samples = ImageData | CloudData
HOLD_OUT_SEED = 0  # every run of every seed keeps the same samples out


@lru_cache(maxsize=4)
def _read(name: str, folder: Path | None, download: bool, rotate: float | None) -> Samples:
    """A few data sets stay in memory: a study reads and turns them once."""
    if name in CLOUD_SETS:
        assert folder is not None
        return load_clouds(name, folder)
    if rotate is None:
        return load_images(name, folder, download)
    data = _read(name, folder, download, None)
    train_x, test_x = rotate_images(data.train_x, rotate), rotate_images(data.test_x, rotate)
    return replace(data, train_x=train_x, test_x=test_x)


PARTS = ("train_x", "train_y", "test_x", "test_y")


def digest_of(data: Samples) -> str:
    """Of all samples and labels that a run learns from and is tested on."""
    return digest([getattr(data, name) for name in PARTS])


def load_data(config: TrainConfig) -> Samples:
    """The data set of a run on its device (images uint8), split as configured."""
    data = _read(config.data, config.data_dir, config.download, config.rotate)
    if config.hold_out:
        data = data.hold_out(config.hold_out, HOLD_OUT_SEED)
    if config.train_images is not None:
        if config.train_images > len(data.train_x):
            raise ValueError(
                f"train_images must be in [1, {len(data.train_x)}], got {config.train_images}"
            )
        data = _first(data, config.train_images)
    check_sizes(config, data)
    return replace(data, **{k: getattr(data, k).to(config.device) for k in PARTS})


def _first(data: Samples, count: int) -> Samples:
    """The first training images; of clouds, whose files may be sorted by class, a fixed pick."""
    keep = torch.arange(count)
    if isinstance(data, CloudData):
        keep = torch.from_numpy(shuffled(len(data.train_x), HOLD_OUT_SEED))[:count]
    return replace(data, train_x=data.train_x[keep], train_y=data.train_y[keep])


def check_sizes(config: TrainConfig, data: Samples) -> None:
    """Raise ValueError where a batch is larger than the training set, or a cloud too small."""
    kind = "images" if config.points is None else "clouds"
    if config.batch_size > len(data.train_x):
        raise ValueError(
            f"batch_size must be in [1, {len(data.train_x)}] (training {kind}), "
            f"got {config.batch_size}"
        )
    if config.points is not None and config.points > data.train_x.shape[1]:
        raise ValueError(
            f"points must be in [1, {data.train_x.shape[1]}] (of a cloud), got {config.points}"
        )
