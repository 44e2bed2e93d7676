"""Image sets by their names."""

from __future__ import annotations

from pathlib import Path

from elasticzo.data.cifar import load_cifar10
from elasticzo.data.images import ImageData, load_digits, load_fashion_mnist, load_mnist

IMAGE_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")


def load_images(name: str, root: str | Path | None = None, download: bool = False) -> ImageData:
    """Load an image set by its name.

    Args:
        name: one of `IMAGE_SETS`.
        root: folder of the files; "digits" has none and needs no root.
        download: fetch missing files (never needed for "digits").
    Raises:
        ValueError: unknown name, or no root for a set that needs one; and see the set's loader.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"unknown image set {name!r}, expected one of {', '.join(IMAGE_SETS)}")
    if name == "digits":
        return load_digits()
    if root is None:
        raise ValueError(f"{name} is read from files: root must name their folder, got None")
    if name == "cifar10":
        if download:
            raise ValueError("cifar10 is not fetched: root must hold its batches")
        return load_cifar10(root)
    load = load_mnist if name == "mnist" else load_fashion_mnist
    return load(root, download)
