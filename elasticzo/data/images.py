"""Small grey-scale image sets as tensors: the embedded digits, MNIST and Fashion-MNIST."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticzo.data.download import (
    FASHION_MNIST_SHA256,
    FASHION_MNIST_URL,
    MNIST_SHA256,
    MNIST_URL,
    download_file,
    import_data_extra,
)
from elasticzo.data.idx import read_idx
from elasticzo.data.order import shuffled


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image set with its split; images uint8, 1x28x28, of cifar10 3x32x32.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape, an empty part, a label without a class.
    """

    name: str
    train_x: Tensor  # [N, C, H, W] uint8
    train_y: Tensor  # [N] int64, indices into classes
    test_x: Tensor  # [M, C, H, W] uint8
    test_y: Tensor  # [M] int64
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_part("train", self.train_x, self.train_y, len(self.classes))
        _check_part("test", self.test_x, self.test_y, len(self.classes))
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"test_x must have images of shape {list(self.train_x.shape[1:])} as train_x has,"
                f" got {list(self.test_x.shape[1:])}"
            )

    @cached_property
    def _mean_std(self) -> tuple[float, float]:
        # From the counts of the 256 values: exact sums, whatever the number of pixels.
        counts = torch.bincount(self.train_x.reshape(-1), minlength=256).cpu().double()
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean).square()).sum() / counts.sum()
        return mean.item(), variance.sqrt().item()

    @property
    def mean(self) -> float:
        """Mean of `train_x` / 255 over all pixels."""
        return self._mean_std[0]

    @property
    def std(self) -> float:
        """Standard deviation of `train_x` / 255 over all pixels, dividing by their number."""
        return self._mean_std[1]

    def normalized(self, x: Tensor) -> Tensor:
        """`(x / 255 - mean) / std` with the training set's statistics.

        Args:
            x: uint8, any shape and device.
        Returns:
            float32, same shape and device.
        Raises:
            TypeError: `x` is not uint8.
            ValueError: all training pixels are equal, so there is no spread to divide by.
        """
        if x.dtype != torch.uint8:
            raise TypeError(f"x must be uint8, got {x.dtype}")
        if self.std == 0.0:
            raise ValueError(f"{self.name}: cannot normalise, all training pixels are equal")
        return x.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def hold_out(self, n_valid: int, seed: int) -> "ImageData":
        """Split the training set in two, for choices that must not see the test set.

        Args:
            n_valid: how many training images become the new test set, 1 to N - 1.
            seed: picks them, at least 0; the same pick with every version of numpy and torch.
        Returns:
            The rest as training set (with statistics of its own) and the held-out images as test
            set, both in their old order; this set's test part is not in it.
        Raises:
            ValueError: `n_valid` or `seed` out of range.
        """
        n = len(self.train_x)
        if not 1 <= n_valid <= n - 1:
            raise ValueError(f"n_valid must be in 1..{n - 1} ({n} training images), got {n_valid}")
        valid = torch.zeros(n, dtype=torch.bool, device="cpu")
        valid[torch.from_numpy(shuffled(n, seed)[:n_valid])] = True
        return replace(
            self,
            train_x=self.train_x[~valid],
            train_y=self.train_y[~valid],
            test_x=self.train_x[valid],
            test_y=self.train_y[valid],
        )


def load_digits() -> ImageData:
    """Scikit-learn's 1,797 handwritten digits as 1x28x28; in the package, so no network.

    The 8x8 images become 20x20 (bilinear) inside a border of 4, not 28x28: MNIST's digits lie in
    a 20x20 box too, so networks and settings carry over. (Nearest neighbours among 20,000 MNIST
    images name 72 % of the digits with the border, 54 % without.)

    Returns:
        1,438 training and 359 test images, a fixed split with a fifth of each class for testing.
    Raises:
        ImportError: scikit-learn is missing.
    """
    bunch = import_data_extra("sklearn.datasets", "the digits data").load_digits()
    x = torch.from_numpy(bunch.images)[:, None]  # [1797, 1, 8, 8] float64, 0 to 16
    x = F.interpolate(x, size=(20, 20), mode="bilinear", align_corners=False)
    # Values are multiples of 51 / 1280, some exactly at a half: round halves up in spite of the
    # last bits, so that the images are the same on every machine.
    pixels = (x * (255 / 16) + (0.5 + 1e-6)).floor().to(torch.uint8)
    images = F.pad(pixels, (4, 4, 4, 4))
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        test[members[shuffled(len(members), seed=digit)[: round(len(members) / 5)]]] = True
    y, held = torch.from_numpy(labels), torch.from_numpy(test)
    return ImageData("digits", images[~held], y[~held], images[held], y[held], _DIGITS)


def load_mnist(root: str | Path, download: bool = False, base_url: str = MNIST_URL) -> ImageData:
    """MNIST, 60,000 + 10,000, from the four published IDX files, gzipped or not.

    Args:
        root: folder with the files, or with torchvision's MNIST/raw, which is looked at first.
        download: fetch missing files into `root`/MNIST/raw, and check the hash of those fetched
            before.
        base_url: the folder of a mirror to fetch from.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or not MNIST's.
        DownloadError: a file could not be fetched, see `download_file`.
    """
    return _load_idx_set(_MNIST, Path(root), download, base_url)


def load_fashion_mnist(
    root: str | Path, download: bool = False, base_url: str = FASHION_MNIST_URL
) -> ImageData:
    """Fashion-MNIST, as `load_mnist`, in `root` or `root`/FashionMNIST/raw."""
    return _load_idx_set(_FASHION, Path(root), download, base_url)


_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class _IdxSet:
    """A set published as MNIST is: four files of the same names and shapes."""

    name: str
    folder: str  # torchvision's
    sha256: Mapping[str, str]  # of the gzipped files
    labels_sha256: str  # of the training labels' bytes: tells the sets apart, unpacked or not
    classes: tuple[str, ...]


_MNIST = _IdxSet(
    name="mnist",
    folder="MNIST",
    sha256=MNIST_SHA256,
    labels_sha256="1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    classes=_DIGITS,
)
_FASHION = _IdxSet(
    name="fashion-mnist",
    folder="FashionMNIST",
    sha256=FASHION_MNIST_SHA256,
    labels_sha256="657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    classes=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
)  # fmt: skip


def _load_idx_set(source: _IdxSet, root: Path, download: bool, base_url: str) -> ImageData:
    parts = []
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        for stem, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            path = _locate(source, root, f"{split}-{stem}-ubyte", download, base_url)
            parts.append(torch.from_numpy(_read_checked(source, path, shape)))
    train_x, train_y, test_x, test_y = parts
    train, test = (train_x[:, None], train_y.long()), (test_x[:, None], test_y.long())
    return ImageData(source.name, *train, *test, source.classes)


def _locate(source: _IdxSet, root: Path, stem: str, download: bool, base_url: str) -> Path:
    """Where the file is; fetched first if it is missing and may be."""
    folder = root / source.folder / "raw"
    fetched = folder / f"{stem}.gz"
    places = [fetched, folder / stem, root / f"{stem}.gz", root / stem]
    found = next((place for place in places if place.is_file()), None)
    if download and found in (None, fetched):
        url = f"{base_url.rstrip('/')}/{fetched.name}"
        return download_file(url, fetched, source.sha256[fetched.name])
    if found is None:
        raise FileNotFoundError(
            f"{source.name}: {stem}[.gz] is neither in {folder} nor in {root};"
            " download=True (--download) fetches it"
        )
    return found


def _read_checked(source: _IdxSet, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The file's uint8 values, of the expected shape, and labels within the classes."""
    again = "move it away and fetch it again with download=True (--download)"
    try:
        values = read_idx(path)
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error
    if values.dtype != np.uint8 or values.shape != shape:
        found = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"{path}: expected uint8 {list(shape)}, got {found}; {again}")
    if len(shape) > 1:
        return values
    last = len(source.classes) - 1
    if values.max() > last:
        raise ValueError(f"{path}: expected labels 0 to {last}, got {values.max()}; {again}")
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    for other in (_MNIST, _FASHION):
        if other is not source and digest == other.labels_sha256:
            raise ValueError(f"{path}: expected {source.name}, got the files of {other.name}")
    return values


def _check_part(part: str, x: Tensor, y: Tensor, n_classes: int) -> None:
    """One part of an `ImageData`."""
    for name, tensor, dtype in ((f"{part}_x", x, torch.uint8), (f"{part}_y", y, torch.int64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"{part}_x must have shape [N, C, H, W], N > 0, got {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{part}_y must have shape [{len(x)}], got {list(y.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{part}_y must be in 0..{n_classes - 1}, got {low} to {high}")
