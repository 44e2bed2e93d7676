"""Point clouds as tensors: ModelNet10 and ModelNet40 from HDF5 files as they are published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elasticzo.data.download import import_data_extra
from elasticzo.data.order import shuffled

CLOUD_SETS = ("modelnet10", "modelnet40")
MOST_SMALLER = 100  # a file may be so many times smaller than what it holds: coordinates compress


@dataclass(frozen=True, eq=False)
class CloudData:
    """A labelled set of point clouds with its split; coordinates in units of the unit sphere.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape, an empty part, a coordinate that is not finite, a
            label without a class, an axis that is none.
    """

    name: str
    train_x: Tensor  # [N, P, 3] float32
    train_y: Tensor  # [N] int64, indices into classes
    test_x: Tensor  # [M, P, 3] float32
    test_y: Tensor  # [M] int64
    classes: tuple[str, ...]
    up: int = 1  # the vertical axis, which augmentation turns clouds about

    def __post_init__(self) -> None:
        _check_part("train", self.train_x, self.train_y, len(self.classes))
        _check_part("test", self.test_x, self.test_y, len(self.classes))
        if self.train_x.shape[1] != self.test_x.shape[1]:
            raise ValueError(
                f"test_x must have {self.train_x.shape[1]} points a cloud as train_x has, got "
                f"{self.test_x.shape[1]}"
            )
        if self.up not in (0, 1, 2):
            raise ValueError(f"up must be an axis, 0, 1 or 2, got {self.up!r}")

    def hold_out(self, n_valid: int, seed: int) -> CloudData:
        """Split the training set in two, for choices that must not see the test set.

        Args:
            n_valid: how many training clouds become the new test set, 1 to N - 1.
            seed: picks them, at least 0; the same pick with every version of numpy and torch.
        Returns:
            The rest as training set and the held-out clouds as test set, both in their old order;
            this set's test part is not in it.
        Raises:
            ValueError: `n_valid` or `seed` out of range.
        """
        n = len(self.train_x)
        if not 1 <= n_valid <= n - 1:
            raise ValueError(f"n_valid must be in 1..{n - 1} ({n} training clouds), got {n_valid}")
        valid = torch.zeros(n, dtype=torch.bool, device="cpu")
        valid[torch.from_numpy(shuffled(n, seed)[:n_valid])] = True
        return replace(
            self,
            train_x=self.train_x[~valid],
            train_y=self.train_y[~valid],
            test_x=self.train_x[valid],
            test_y=self.train_y[valid],
        )


def load_clouds(name: str, root: str | Path) -> CloudData:
    """Load a set of point clouds by its name, one of `CLOUD_SETS`.

    Raises: ValueError for an unknown name; and see the set's loader.
    """
    if name not in CLOUD_SETS:
        raise ValueError(f"unknown set of clouds {name!r}, expected one of {', '.join(CLOUD_SETS)}")
    return load_modelnet10(root) if name == "modelnet10" else load_modelnet40(root)


def load_modelnet40(root: str | Path) -> CloudData:
    """ModelNet40, 9,840 + 2,468 clouds of 2,048 points, as published with PointNet.

    Args:
        root: the folder `modelnet40_ply_hdf5_2048`, or the one around it. Its `train_files.txt`
            and `test_files.txt` name HDF5 files beside them with `data` `[N, P, 3]` float32 and
            `label` `[N, 1]` uint8; `shape_names.txt` has a class a line. Any N and P will do.
    Returns: the files' clouds in their order; y is up.
    Raises:
        ImportError: h5py is missing.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or not of this layout.
    """
    return _load("modelnet40", Path(root), "modelnet40_ply_hdf5_2048", classes=40, up=1)


def load_modelnet10(root: str | Path) -> CloudData:
    """ModelNet10 in the layout of `load_modelnet40`, in `root` or `root`/modelnet10_hdf5; z is up,
    as in the meshes."""
    return _load("modelnet10", Path(root), "modelnet10_hdf5", classes=10, up=2)


def _load(name: str, root: Path, folder: str, classes: int, up: int) -> CloudData:
    h5py = import_data_extra("h5py", f"the {name} data")
    listed = "train_files.txt"
    place = next((p for p in (root / folder, root) if (p / listed).is_file()), None)
    if place is None:
        raise FileNotFoundError(f"{name}: {listed} is neither in {root / folder} nor in {root}")
    names = _lines(place / "shape_names.txt")
    if len(names) != classes:
        raise ValueError(
            f"{place / 'shape_names.txt'}: expected the {classes} classes of {name}, got "
            f"{len(names)}"
        )
    train = _read_split(h5py, place / listed, classes)
    test = _read_split(h5py, place / "test_files.txt", classes)
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(
            f"{place}: test clouds must have {train[0].shape[1]} points as the training clouds "
            f"have, got {test[0].shape[1]}"
        )
    return CloudData(name, *train, *test, tuple(names), up)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got other bytes: {error}") from error
    return [line for line in lines if line]


def _read_split(h5py: Any, listed: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Clouds and labels of all files of a list. Lists name files by paths of their author's."""
    paths = [listed.parent / Path(line).name for line in _lines(listed)]
    if not paths:
        raise ValueError(f"{listed}: expected names of HDF5 files, got none")
    parts = [_read_file(h5py, path, classes) for path in paths]
    points = sorted({part[0].shape[1] for part in parts})
    if len(points) > 1:
        raise ValueError(f"{listed}: expected files of equal points a cloud, got {points}")
    clouds, labels = zip(*parts, strict=True)
    return torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(np.concatenate(labels))


def _read_file(h5py: Any, path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`[N, P, 3]` float32 and `[N]` int64."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with h5py.File(path, "r") as file:
            found = {key: _read_set(h5py, file, key, path) for key in ("data", "label")}
    except _Refused:
        raise
    except Exception as error:  # whatever h5py raises where bytes are damaged
        raise ValueError(
            f"{path}: expected a whole HDF5 file, got a damaged one: {error}"
        ) from error
    x, y = np.asarray(found["data"]), np.asarray(found["label"])
    if x.dtype.kind != "f" or x.ndim != 3 or x.shape[2] != 3 or 0 in x.shape:
        raise ValueError(
            f"{path}: expected data of floats [N, P, 3], got {x.dtype} {list(x.shape)}"
        )
    if y.dtype.kind not in "iu" or y.shape not in ((len(x), 1), (len(x),)):
        raise ValueError(
            f"{path}: expected labels, integers [{len(x)}, 1], got {y.dtype} {list(y.shape)}"
        )
    x, y = x.astype(np.float32), y.reshape(-1).astype(np.int64)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: expected finite coordinates, got NaN or infinity")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{path}: expected labels 0 to {classes - 1}, got {y.min()} to {y.max()}")
    return x, y


class _Refused(ValueError):
    """A file that is whole, and not what was expected."""


def _read_set(h5py: Any, file: Any, key: str, path: Path) -> Any:
    """The values of one dataset, which lie in this very file."""
    if key not in file:
        raise _Refused(f"{path}: expected the datasets data and label, {key} is missing")
    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
        raise _Refused(f"{path}: expected {key} to be a dataset of this file, got a link or group")
    found = file[key]
    if found.external or found.is_virtual:
        raise _Refused(f"{path}: expected {key} to lie in this file, got one that reads others")
    size = path.stat().st_size
    if found.nbytes > max(MOST_SMALLER * size, 1 << 20):
        raise _Refused(
            f"{path}: expected {key} of at most {MOST_SMALLER} times the file's {size} bytes, got "
            f"{found.dtype} {list(found.shape)}, {found.nbytes} bytes"
        )
    return found[()]


def _check_part(part: str, x: Tensor, y: Tensor, n_classes: int) -> None:
    """One part of a `CloudData`."""
    for name, tensor, dtype in ((f"{part}_x", x, torch.float32), (f"{part}_y", y, torch.int64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if x.dim() != 3 or x.shape[2] != 3 or 0 in x.shape:
        raise ValueError(f"{part}_x must have shape [N, P, 3], N and P > 0, got {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{part}_y must have shape [{len(x)}], got {list(y.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{part}_x must be finite, got NaN or infinity")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{part}_y must be in 0..{n_classes - 1}, got {low} to {high}")
