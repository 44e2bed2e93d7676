"""CIFAR-10 from its published "python version": pickled batches, none of which is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticzo.data.images import ImageData

FOLDER = "cifar-10-batches-py"
SIDE, CHANNELS = 32, 3
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# What an array is made of; a file that names anything else is refused, not run.
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


REFUSED = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, MemoryError, TypeError,
    ValueError,
)  # fmt: skip


class _Arrays(pickle.Unpickler):
    """Numbers, text, lists, dictionaries and arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array has")
        return super().find_class(module, name)


def load_cifar10(root: str | Path) -> ImageData:
    """CIFAR-10, `[3, 32, 32]`, up to 50,000 + 10,000: of all training batches that are there.

    Args:
        root: folder with data_batch_1 ... data_batch_5 and test_batch, or with
            cifar-10-batches-py.
    Raises:
        FileNotFoundError: no batch for training, or none for testing.
        ValueError: a file that is no batch of such images.
    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    folder = Path(root)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    train = sorted(folder.glob("data_batch_[1-5]"))
    test = folder / "test_batch"
    missing = [name for name, there in (("data_batch_1", train), (test.name, test.exists()))
               if not there]  # fmt: skip
    if missing:
        raise FileNotFoundError(f"cifar10: {missing[0]} is neither in {folder / FOLDER} nor in "
                                f"{folder}")  # fmt: skip
    parts = [_read(path) for path in train]
    test_x, test_y = _read(test)
    train_x, train_y = (torch.cat(part) for part in zip(*parts, strict=True))
    return ImageData("cifar10", train_x, train_y, test_x, test_y, CLASSES)


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one batch."""
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels of shape {list(labels.shape)} and type {labels.dtype}")
    except REFUSED as error:
        raise ValueError(f"{path} is no batch of CIFAR-10: {error}") from None
    width = CHANNELS * SIDE * SIDE
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), width) or not len(labels):
        raise ValueError(
            f"{path}: expected uint8 images [n, {width}] and as many labels, got "
            f"{pixels.dtype} {list(pixels.shape)} and {len(labels)}"
        )
    images = torch.from_numpy(pixels.copy()).view(-1, CHANNELS, SIDE, SIDE)
    return images, torch.from_numpy(labels.astype(np.int64))
