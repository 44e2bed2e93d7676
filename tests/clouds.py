"""Tiny point clouds in the layout in which ModelNet is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

CLASSES = 10


def cloud_arrays(n: int, points: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`[n, points, 3]` float32 and `[n, 1]` uint8: ellipsoids, a class by its proportions."""
    chance = np.random.default_rng(seed)
    label = np.arange(n) % CLASSES
    direction = chance.standard_normal((n, points, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    axes = np.stack([1 - label / 12, 0.2 + label % 4 / 5, 0.3 + label % 3 / 4], -1)
    return (direction * axes[:, None]).astype(np.float32), label.astype(np.uint8)[:, None]


def write_modelnet10(root: Path, train: int = 40, test: int = 20, points: int = 24) -> Path:
    """Two training files and a test file; the folder that holds them."""
    h5py = pytest.importorskip("h5py")
    folder = root / "modelnet10_hdf5"
    folder.mkdir(parents=True)
    half = train // 2
    sizes = {"train0": half, "train1": train - half, "test0": test}
    for seed, (name, n) in enumerate(sizes.items()):
        x, y = cloud_arrays(n, points, seed)
        with h5py.File(folder / f"ply_data_{name}.h5", "w") as file:
            file.create_dataset("data", data=x)
            file.create_dataset("label", data=y)
    for split in ("train", "test"):  # paths of another machine, as published
        lines = [f"data/published/ply_data_{name}.h5" for name in sizes if name.startswith(split)]
        (folder / f"{split}_files.txt").write_text("\n".join(lines) + "\n")
    names = [f"shape{i}" for i in range(CLASSES)]
    (folder / "shape_names.txt").write_text("\n".join(names) + "\n")
    return folder


__all__ = ["CLASSES", "cloud_arrays", "write_modelnet10"]
