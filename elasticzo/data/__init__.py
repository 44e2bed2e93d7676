"""Loaders for real data sets."""

from elasticzo.data.augment import augment_clouds
from elasticzo.data.cifar import load_cifar10
from elasticzo.data.clouds import (
    CLOUD_SETS,
    CloudData,
    load_clouds,
    load_modelnet10,
    load_modelnet40,
)
from elasticzo.data.download import DownloadError, download_fashion_mnist, download_mnist
from elasticzo.data.idx import read_idx
from elasticzo.data.images import (
    ImageData,
    load_digits,
    load_fashion_mnist,
    load_mnist,
)
from elasticzo.data.order import epoch_order, shuffled
from elasticzo.data.rotation import rotate_images
from elasticzo.data.sets import IMAGE_SETS, load_images

__all__ = [
    "CLOUD_SETS",
    "IMAGE_SETS",
    "CloudData",
    "DownloadError",
    "ImageData",
    "augment_clouds",
    "download_fashion_mnist",
    "download_mnist",
    "epoch_order",
    "load_cifar10",
    "load_clouds",
    "load_digits",
    "load_fashion_mnist",
    "load_images",
    "load_mnist",
    "load_modelnet10",
    "load_modelnet40",
    "read_idx",
    "rotate_images",
    "shuffled",
]
