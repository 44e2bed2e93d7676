"""Loaders for real data sets."""

from elasticzo.data.download import DownloadError, download_fashion_mnist, download_mnist
from elasticzo.data.idx import read_idx
from elasticzo.data.images import (
    IMAGE_SETS,
    ImageData,
    load_digits,
    load_fashion_mnist,
    load_images,
    load_mnist,
)
from elasticzo.data.order import epoch_order
from elasticzo.data.rotation import rotate_images

__all__ = [
    "IMAGE_SETS",
    "DownloadError",
    "ImageData",
    "download_fashion_mnist",
    "download_mnist",
    "epoch_order",
    "load_digits",
    "load_fashion_mnist",
    "load_images",
    "load_mnist",
    "read_idx",
    "rotate_images",
]
