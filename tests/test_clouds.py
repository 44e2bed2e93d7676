"""elasticzo.data: point clouds from HDF5 files, and their augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elasticzo.data import (
    CloudData,
    augment_clouds,
    epoch_order,
    load_clouds,
    load_modelnet10,
    load_modelnet40,
)
from tests.clouds import cloud_arrays, write_modelnet10

# ---- files


@pytest.mark.parametrize("inside", [True, False])
def test_clouds_of_all_files_in_their_order(tmp_path: Path, inside: bool) -> None:
    folder = write_modelnet10(tmp_path)
    data = load_modelnet10(folder if inside else tmp_path)
    parts = [cloud_arrays(20, 24, seed) for seed in (0, 1)]
    assert torch.equal(data.train_x, torch.from_numpy(np.concatenate([x for x, _ in parts])))
    assert data.train_y.tolist() == [*range(10)] * 4 and data.test_y.tolist() == [*range(10)] * 2
    assert torch.equal(data.test_x, torch.from_numpy(cloud_arrays(20, 24, 2)[0]))
    assert data.name == "modelnet10" and data.classes[3] == "shape3" and data.up == 2
    with pytest.raises(ValueError, match="expected the 40 classes of modelnet40, got 10"):
        load_modelnet40(folder)
    with pytest.raises(ValueError, match="unknown set of clouds 'shapenet', expected one of model"):
        load_clouds("shapenet", folder)


def rewrite(path: Path, **datasets: Any) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values)


def elsewhere(path: Path, how: str) -> None:
    """A file whose data are no values of its own."""
    import h5py

    rewrite(path.with_name("other.h5"), data=X)
    with h5py.File(path, "w") as file:
        file.create_dataset("label", data=Y)
        if how == "link":
            file["data"] = h5py.ExternalLink("other.h5", "data")
        elif how == "group":
            file.create_group("data")
        elif how == "external":
            place = [(str(path.with_name("other.h5")), 0, X.nbytes)]
            file.create_dataset("data", X.shape, X.dtype, external=place)
        else:  # nothing is stored: what is not written reads as 0
            file.create_dataset("data", (2**20, 2**10, 3), "f4", chunks=(64, 64, 3))


X, Y = cloud_arrays(4)
TRAIN = "ply_data_train1.h5"
DAMAGE: list[tuple[str, Callable[[Path], object], type[Exception], str]] = [
    ("no list", lambda f: (f / "train_files.txt").unlink(), FileNotFoundError, "neither in .* nor"),
    ("no names", lambda f: (f / "shape_names.txt").unlink(), FileNotFoundError, "names.txt is mis"),
    ("no test list", lambda f: (f / "test_files.txt").unlink(), FileNotFoundError, "test_files.tx"),
    ("no file", lambda f: (f / TRAIN).unlink(), FileNotFoundError, "train1.h5 is missing"),
    ("empty list", lambda f: (f / "test_files.txt").write_text("\n"), ValueError, "got none"),
    ("binary list", lambda f: (f / "test_files.txt").write_bytes(b"\xff"), ValueError, "expected"),
    ("no HDF5", lambda f: (f / TRAIN).write_bytes(b"PK\3\4"), ValueError, "expected a w"),
    ("cut off", lambda f: (f / TRAIN).write_bytes((f / TRAIN).read_bytes()[:-99]), ValueError,
     "train1.h5: expected a whole HDF5 file"),
    ("no labels", lambda f: rewrite(f / TRAIN, data=X), ValueError, "label is missing"),
    ("a pair", lambda f: rewrite(f / TRAIN, data=X[..., :2], label=Y), ValueError,
     r"expected data of floats \[N, P, 3\], got float32 \[4, 24, 2\]"),
    ("integers", lambda f: rewrite(f / TRAIN, data=X.astype(int), label=Y), ValueError,
     r"expected data of floats"),
    ("few labels", lambda f: rewrite(f / TRAIN, data=X, label=Y[:3]), ValueError,
     r"expected labels, integers \[4, 1\], got uint8 \[3, 1\]"),
    ("wild label", lambda f: rewrite(f / TRAIN, data=X, label=Y + 9), ValueError,
     "expected labels 0 to 9, got 9 to 12"),
    ("NaN", lambda f: rewrite(f / TRAIN, data=X * np.nan, label=Y), ValueError, "finite"),
    ("a link", lambda f: elsewhere(f / TRAIN, "link"), ValueError, "a dataset of this file, got a"),
    ("a group", lambda f: elsewhere(f / TRAIN, "group"), ValueError, "dataset of this file, got a"),
    ("external", lambda f: elsewhere(f / TRAIN, "external"), ValueError, "one that reads others"),
    ("12 GiB", lambda f: elsewhere(f / TRAIN, "huge"), ValueError,
     r"at most 100 times the file's \d+ bytes, got float32 .*, 12884901888 bytes"),
    ("points", lambda f: rewrite(f / TRAIN, data=X[:, :9], label=Y), ValueError,
     r"expected files of equal points a cloud, got \[9, 24\]"),
    ("test points", lambda f: rewrite(f / "ply_data_test0.h5", data=X[:, :9], label=Y), ValueError,
     "test clouds must have 24 points as the training clouds have, got 9"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), [d[1:] for d in DAMAGE],
                         ids=[d[0] for d in DAMAGE])  # fmt: skip
def test_names_what_is_missing_or_damaged(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = write_modelnet10(tmp_path)
    spoil(folder)
    with pytest.raises(error, match=message):
        load_modelnet10(folder)


def test_a_flipped_byte_is_a_value_error_or_no_harm(tmp_path: Path) -> None:
    folder = write_modelnet10(tmp_path)
    content, whole, refused = (folder / TRAIN).read_bytes(), load_modelnet10(folder), 0
    for at in range(0, 2400, 17):  # where the structure is
        changed = bytearray(content)
        changed[at] ^= 0xFF
        (folder / TRAIN).write_bytes(changed)
        try:
            data = load_modelnet10(folder)
        except ValueError:
            refused += 1
        else:  # a byte of no meaning, or of a value
            assert data.train_x.shape == whole.train_x.shape
            assert torch.isfinite(data.train_x).all() and data.train_y.min() >= 0
    assert 0 < refused < len(range(0, 2400, 17))


def clouds(n: int = 6) -> CloudData:
    x, y = (torch.from_numpy(a) for a in cloud_arrays(n))
    y = y.flatten().long()
    return CloudData("toy", x, y, x[:2], y[:2], tuple("abcdefghij"))


def test_hold_out_splits_the_training_set_only() -> None:
    data = clouds(30)
    half = data.hold_out(10, seed=1)
    # Pinned: a seed in someone's paper must pick the same clouds for ever.
    chosen = [2, 4, 9, 14, 16, 18, 19, 21, 27, 28]
    assert torch.equal(half.test_x, data.train_x[chosen])
    rest = [i for i in range(30) if i not in chosen]
    assert torch.equal(half.train_x, data.train_x[rest]) and half.train_y.tolist() == [
        i % 10 for i in rest
    ]
    with pytest.raises(
        ValueError, match=r"n_valid must be in 1\.\.29 \(30 training clouds\), got 30"
    ):
        data.hold_out(30, seed=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_x": torch.zeros(6, 24, 3).double()}, TypeError, "train_x must be torch.float32"),
        ({"test_y": torch.zeros(2)}, TypeError, "test_y must be torch.int64, got torch.float32"),
        ({"test_x": torch.zeros(2, 3, 24)}, ValueError, r"\[N, P, 3\].*\[2, 3, 24\]"),
        ({"train_y": torch.zeros(3).long()}, ValueError, r"train_y must have shape \[6\], got \[3"),
        ({"train_y": torch.full((6,), 10)}, ValueError, r"train_y must be in 0\.\.9, got 10 to 10"),
        ({"train_x": torch.full((6, 24, 3), torch.inf)}, ValueError, "train_x must be finite"),
        ({"test_x": torch.zeros(2, 23, 3)}, ValueError, "test_x must have 24 points .* got 23"),
        ({"up": 3}, ValueError, "up must be an axis, 0, 1 or 2, got 3"),
    ],
)
def test_cloud_data_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(clouds(), **change)


# ---- augmentation


def test_the_same_bits_from_seed_and_step_on_every_backend() -> None:
    x = torch.rand(4, 33, 3) * 2 - 1
    before = x.clone()
    y = augment_clouds(x, seed=5, step=9, up=1)
    assert torch.equal(x, before)
    for backend in ("reference", "triton"):
        assert torch.equal(y, augment_clouds(x, seed=5, step=9, up=1, backend=backend))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(y, augment_clouds(apart, seed=5, step=9, up=1))
    for other in ({"seed": 6, "step": 9}, {"seed": 5, "step": 10}):
        assert not torch.equal(y, augment_clouds(x, up=1, **other))
    order = epoch_order(4, seed=5, epoch=9)  # another stream than that of augmentation
    assert sorted(order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("up", [0, 1, 2])
def test_turns_about_the_vertical_axis_alone(up: int) -> None:
    x = torch.rand(2000, 2, 3) * 2 - 1
    y = augment_clouds(x, seed=0, step=0, up=up, shift=0.0, jitter=0.0)
    assert torch.equal(y[..., up], x[..., up])
    a, b = (i for i in range(3) if i != up)
    before, after = (torch.atan2(t[..., b], t[..., a]).double() for t in (x, y))
    angle = torch.remainder(after - before + torch.pi, 2 * torch.pi) - torch.pi
    assert torch.allclose(angle[:, 0], angle[:, 1], atol=1e-4)  # a cloud turns as a whole
    degrees = torch.rad2deg(angle[:, 0])
    assert degrees.abs().max() <= 45.001 and degrees.abs().max() > 44
    # Uniform in +-45: mean 0 and deviation 90 / sqrt(12), within 5 standard errors of n = 2,000.
    assert abs(degrees.mean()) < 5 * 26.0 / 2000**0.5
    assert abs(degrees.std() / (90 / 12**0.5) - 1) < 5 * (0.8 / 4 / 2000) ** 0.5
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_shifts_a_cloud_and_jitters_points() -> None:
    x = torch.rand(400, 100, 3)
    shifts = augment_clouds(x, seed=1, step=0, up=2, degrees=0.0, jitter=0.0, shift=0.25) - x
    assert torch.allclose(shifts, shifts[:, :1].expand_as(shifts), atol=1e-6)
    own = shifts[:, 0].double()
    assert own.abs().max() <= 0.25 + 1e-6
    assert (own.mean(0).abs() < 5 * 0.25 / 3**0.5 / 20).all()
    correlation = torch.corrcoef(own.T) - torch.eye(3)
    assert correlation.abs().max() < 5 / 20
    noise = augment_clouds(x, seed=1, step=0, up=2, degrees=0.0, shift=0.0) - x
    values = noise.double()
    assert abs(values.mean()) < 5 * 0.01 / 120_000**0.5
    assert abs(values.std() / 0.01 - 1) < 5 / (2 * 120_000) ** 0.5 + 1e-4  # the table's own 1e-4
    clipped = augment_clouds(x, seed=1, step=0, up=2, degrees=0.0, shift=0.0, clip=0.012) - x
    assert clipped.abs().max() <= 0.012 + 1e-6
    assert torch.equal(clipped.abs() > 0.0119, noise.abs() > 0.0119)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 5)},
            r"x must be float32 \[B, P, 3\], got torch.float32",
        ),
        ({"x": torch.zeros(2, 5, 3).double()}, r"x must be float32"),
        ({"up": -1}, "up must be an axis, 0, 1 or 2, got -1"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"seed": 1.5}, r"seed must be an integer in \[0, 2\^63\), got 1.5"),
        ({"step": 2**40}, r"step must be an integer in \[0, 2\^32\), got 1099511627776"),
        ({"step": -1}, r"step must be an integer in \[0, 2\^32\), got -1"),
        ({"shift": -0.1}, r"shift must be in \[0, inf\), got -0.1"),
        ({"jitter": float("nan")}, r"jitter must be in \[0, inf\), got nan"),
    ],
)
def test_augmentation_refuses(changes: dict[str, Any], message: str) -> None:
    settings = {"x": torch.zeros(2, 5, 3), "seed": 0, "step": 0, "up": 1} | changes
    with pytest.raises(ValueError, match=message):
        augment_clouds(settings.pop("x"), **settings)
