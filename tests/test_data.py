"""elasticzo.data: IDX files, image sets and downloads. No network beyond the loopback."""

import gzip
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elasticzo.data import ImageData, images, load_images, load_mnist, read_idx
from elasticzo.data import download as dl

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
SPLITS = (("train", 60_000), ("t10k", 10_000))


def idx_bytes(values: np.ndarray) -> bytes:
    code = IDX_CODES[values.dtype.str[1:]]
    shape = np.array(values.shape, dtype=">u4").tobytes()
    big_endian = values.astype(values.dtype.newbyteorder(">")).tobytes()
    return bytes([0, 0, code, values.ndim]) + shape + big_endian


def image_data(train: list[int], classes: int = 2) -> ImageData:
    """Training images 1x2x2 of one grey value each; label i % 2."""
    x = torch.tensor(train, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    y = torch.arange(len(train)) % 2
    return ImageData("toy", x, y, x[:1], y[:1], tuple("abc"[:classes]))


# ---- IDX


@pytest.mark.parametrize("packing", ["plain", "gz", "gz-without-the-name"])
@pytest.mark.parametrize("code", IDX_CODES)
def test_read_idx_returns_the_values_written(tmp_path: Path, code: str, packing: str) -> None:
    values = np.array([[0, 1, 2], [3, 100, 127]], dtype=code)
    if code != "u1":
        values = -values
    raw = idx_bytes(values)
    path = tmp_path / ("x.gz" if packing == "gz" else "x")
    path.write_bytes(raw if packing == "plain" else gzip.compress(raw))
    got = read_idx(str(path))
    assert got.dtype == np.dtype(code) and got.dtype.isnative and got.flags.writeable
    assert np.array_equal(got, values)


RAW = idx_bytes(np.arange(6, dtype="i2").reshape(2, 3))
PACKED = gzip.compress(RAW, mtime=0)  # its bytes name the tests below: the same in every process


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x", RAW[:-1], r"truncated: expected 12 bytes of data for shape \[2, 3\] int16, got 11"),
        ("x", RAW + b"!", r"trailing bytes: expected 12 bytes .* got 13"),
        ("x", RAW[:7], "truncated: expected a header of 12 bytes, got 7"),
        ("x", b"\0\0\x0a\2" + RAW[4:], "bad magic: .* type code .*08, 09.* got 00 00 0a 02"),
        ("x", b"PK\3\4" + RAW[4:], "bad magic: expected 00 00, .* got 50 4b 03 04"),
        ("x", b"\0\0\x08\0\7", "bad magic: .* 1 to 32 dimensions, got 00 00 08 00"),
        ("x", b"", "bad magic: .* got nothing"),
        ("x.gz", RAW, r"expected gzip data \(first bytes 1f 8b\), got 00 00"),
        ("x.gz", PACKED[:-9], "expected whole gzip data, got a damaged file"),
        ("x.gz", PACKED[:-8] + bytes(8), "expected whole gzip data, got a damaged file: CRC"),
        ("x.gz", PACKED[:10] + b"\xff" + PACKED[11:], "expected whole gzip data"),
        ("x", b"\0\0\x08\2" + b"\xff" * 8, "truncated: expected 18446744065119617025 bytes"),
    ],
)
def test_read_idx_names_the_damage(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(error.value).startswith(str(path))


def test_read_idx_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: expected an IDX file, found nothing"):
        read_idx(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="expected an IDX file, found a folder"):
        read_idx(tmp_path)


# ---- ImageData


def test_statistics_and_normalisation() -> None:
    data = image_data([0, 255, 255, 255])
    assert data.mean == pytest.approx(0.75) and data.std == pytest.approx(0.1875**0.5)
    got = data.normalized(torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8))
    want = (torch.tensor([[0.0, 0.2], [1.0, 0.4]]) - 0.75) / 0.1875**0.5
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    assert data.train_x.flatten().tolist() == [0] * 4 + [255] * 12  # left as it was


def test_normalisation_refuses() -> None:
    with pytest.raises(TypeError, match=r"x must be uint8, got torch\.float32"):
        image_data([0, 255]).normalized(torch.zeros(1))
    with pytest.raises(ValueError, match="toy: cannot normalise, all training pixels are equal"):
        image_data([9, 9]).normalized(torch.zeros(1, dtype=torch.uint8))


def test_hold_out_splits_the_training_set_only() -> None:
    data = image_data(list(range(100)))
    half = data.hold_out(30, seed=1)
    train, valid = half.train_x[:, 0, 0, 0].tolist(), half.test_x[:, 0, 0, 0].tolist()
    # Pinned: a seed in someone's paper must pick the same images for ever.
    assert valid[:8] == [2, 9, 16, 18, 19, 21, 27, 28] and len(valid) == 30
    assert sorted(train + valid) == list(range(100)) and train == sorted(train)
    assert half.train_y.tolist() == [i % 2 for i in train]
    assert half.test_y.tolist() == [i % 2 for i in valid]
    assert half.mean == pytest.approx(sum(train) / 70 / 255)
    assert data.hold_out(30, seed=1).test_x.equal(half.test_x)
    assert not data.hold_out(30, seed=2).test_x.equal(half.test_x)


@pytest.mark.parametrize("n_valid", [0, -1, 4, 5])
def test_hold_out_refuses_a_size_out_of_range(n_valid: int) -> None:
    message = rf"n_valid must be in 1\.\.3 \(4 training images\), got {n_valid}"
    with pytest.raises(ValueError, match=message):
        image_data([1, 2, 3, 4]).hold_out(n_valid, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        image_data([1, 2, 3, 4]).hold_out(1, seed=-1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_x": torch.zeros(2, 1, 2, 2)}, TypeError, "train_x must be torch.uint8, got"),
        ({"test_y": torch.zeros(1)}, TypeError, "test_y must be torch.int64, got torch.float32"),
        ({"test_x": torch.zeros(1, 4, dtype=torch.uint8)}, ValueError, r"\[N, C, H, W\].*\[1, 4\]"),
        ({"train_y": torch.zeros(3).long()}, ValueError, r"train_y must have shape \[2\], got \[3"),
        ({"train_y": torch.tensor([0, 2])}, ValueError, r"train_y must be in 0\.\.1, got 0 to 2"),
        ({"test_x": torch.zeros(1, 1, 3, 3).byte()}, ValueError, r"\[1, 2, 2\] as train_x has"),
    ],
)
def test_image_data_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(image_data([1, 2]), **change)


# ---- the sets


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = load_images("digits")
    assert data.train_x.shape == (1438, 1, 28, 28) and data.test_x.shape == (359, 1, 28, 28)
    assert data.test_y.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert data.classes == tuple("0123456789")
    both = torch.cat([data.train_x, data.test_x])
    assert both.sum() == both[..., 4:24, 4:24].sum() and both.max() == 255
    bunch = datasets.load_digits()
    ink = both[..., 4:24, 4:24].double().mean().item() / 255
    assert ink == pytest.approx(bunch.images.mean() / 16, rel=0.01)  # resizing keeps the mean
    labels = torch.cat([data.train_y, data.test_y])
    assert labels.bincount().tolist() == list(np.bincount(bunch.target))
    # Pinned: the split and the pixels must be the same on every machine.
    assert hashlib.sha256(both.numpy().tobytes()).hexdigest().startswith("06da87224c436d29")


def test_unknown_name_and_missing_root() -> None:
    with pytest.raises(ValueError, match=r"'cifar', expected one of digits, mnist, fashion-mnist"):
        load_images("cifar")
    with pytest.raises(ValueError, match="mnist is read from files: root must name their folder"):
        load_images("mnist")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"sklearn: pip install elasticzo\[data\]"):
        load_images("digits")
    with pytest.raises(ImportError, match=r"pooch: pip install elasticzo\[data\]"):
        dl.download_file("http://127.0.0.1/x", tmp_path / "x", "0" * 64)


@pytest.fixture(scope="module")
def full_size() -> dict[str, bytes]:
    """The four gzipped files at their full size: image i holds i % 251, its label is i % 10."""
    files = {}
    for split, count in SPLITS:
        grey = np.arange(count, dtype=np.int64) % 251
        pixels = np.broadcast_to(grey.astype("u1")[:, None, None], (count, 28, 28))
        labels = (np.arange(count) % 10).astype("u1")
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(pixels), 1)
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels), 1)
    return files


def write(folder: Path, files: dict[str, bytes], packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        if packed:
            (folder / name).write_bytes(raw)
        else:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(raw))


@pytest.mark.parametrize(
    ("name", "folder", "packed"),
    [
        ("mnist", ".", True),
        ("mnist", "MNIST/raw", False),
        ("fashion-mnist", "FashionMNIST/raw", True),
    ],
)
def test_idx_sets(
    tmp_path: Path, full_size: dict[str, bytes], name: str, folder: str, packed: bool
) -> None:
    write(tmp_path / folder, full_size, packed)
    data = load_images(name, tmp_path)
    assert data.name == name and len(data.classes) == 10
    for x, y, count in ((data.train_x, data.train_y, 60_000), (data.test_x, data.test_y, 10_000)):
        assert x.shape == (count, 1, 28, 28) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert x[:, 0, 27, 27].equal((torch.arange(count) % 251).to(torch.uint8))
        assert y.equal(torch.arange(count) % 10)


def test_idx_sets_name_the_bad_file(tmp_path: Path, full_size: dict[str, bytes]) -> None:
    labels, again = "train-labels-idx1-ubyte", "fetch it again with download=True"
    with pytest.raises(FileNotFoundError, match=r"mnist: train-images.*neither in .*download=True"):
        load_mnist(tmp_path)
    write(tmp_path, full_size)
    path = tmp_path / f"{labels}.gz"
    for values, message in (
        (np.zeros(59_999, "u1"), r"expected uint8 \[60000\], got uint8 \[59999\]"),
        (np.zeros(60_000, "i2"), r"expected uint8 \[60000\], got int16 \[60000\]"),
        (np.full(60_000, 10, "u1"), "expected labels 0 to 9, got 10"),
    ):
        path.write_bytes(gzip.compress(idx_bytes(values)))
        with pytest.raises(ValueError, match=f"{labels}.gz: {message}; .*{again}"):
            load_mnist(tmp_path)
    path.write_bytes(full_size[path.name][:-20])
    with pytest.raises(ValueError, match=f"{labels}.gz: expected whole gzip data.*; .*{again}"):
        load_mnist(tmp_path)


def test_the_other_set_of_the_same_names_is_refused(
    tmp_path: Path, full_size: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, full_size)
    digest = hashlib.sha256(bytes(i % 10 for i in range(60_000))).hexdigest()
    monkeypatch.setattr(images, "_FASHION", replace(images._FASHION, labels_sha256=digest))
    with pytest.raises(ValueError, match="expected mnist, got the files of fashion-mnist"):
        load_mnist(tmp_path)
