"""What a run sees: the batch of each step and the batches of a test; images and clouds, in floats
and in int8.

The conversion to int8 is that of inputs: floats are used here, and in no integer step. Images and
clouds that do not change are converted once; augmented clouds are floats when they are moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from elasticzo.data import CloudData, ImageData, augment_clouds, epoch_order
from elasticzo.int8 import Int8Tensor, quantize
from experiments.train.config import TrainConfig
from experiments.train.data import Samples

X = TypeVar("X")

TEST_BATCH = 1000
CLOUD_TEST_BATCH = 64  # a cloud of 1,024 points has 4 MiB in the last convolution alone


class BatchOrder:
    """Which samples a step sees: another order every epoch, decided by the seed."""

    def __init__(self, images: int, size: int, seed: int, device: torch.device) -> None:
        self.images, self.size, self.seed, self.device = images, size, seed, device
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.images // self.size)
        if self._order[0] != epoch:
            order = epoch_order(self.images, self.seed, epoch)
            self._order = (epoch, order.to(self.device))
        return self._order[1][place * self.size : (place + 1) * self.size]


class Inputs(ABC, Generic[X]):
    """Batches of a data set, as a network of the run's precision takes them.

    Args:
        config: resolved.
        data: of `load_data`, on the run's device.
    """

    test_batch = TEST_BATCH

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        device = torch.device(config.device)
        self.train_y, self.test_y = data.train_y, data.test_y
        self.steps_per_epoch = len(data.train_x) // config.batch_size
        self.order = BatchOrder(len(data.train_x), config.batch_size, config.seed, device)

    def train(self, step: int) -> tuple[X, Tensor]:
        """Inputs and labels of a step: a function of the configuration and the step."""
        chosen = self.order(step)
        return self.train_x(chosen, step), self.train_y[chosen]

    def tests(self) -> Iterator[tuple[X, Tensor]]:
        """The test set in order."""
        for start in range(0, len(self.test_y), self.test_batch):
            part = slice(start, start + self.test_batch)
            yield self.test_x(part), self.test_y[part]

    @abstractmethod
    def train_x(self, chosen: Tensor, step: int) -> X: ...

    @abstractmethod
    def test_x(self, part: slice) -> X: ...


class FloatImages(Inputs[Tensor]):
    """`[B, C, H, W]`, normalised by the training set's statistics."""

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        super().__init__(config, data)
        self.data = data

    def train_x(self, chosen: Tensor, step: int) -> Tensor:
        return self.data.normalized(self.data.train_x[chosen])

    def test_x(self, part: slice) -> Tensor:
        return self.data.normalized(self.data.test_x[part])


class Int8Images(Inputs[Int8Tensor]):
    """The same in int8: each of the 256 grey values, normalised, has its integer."""

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        super().__init__(config, data)
        grey = torch.arange(256, dtype=torch.uint8, device=data.train_x.device)
        self.table = quantize(data.normalized(grey))
        self.train_q = self._converted(data.train_x)
        self.test_q = self._converted(data.test_x)

    def _converted(self, x: Tensor) -> Tensor:
        return torch.cat([self.table.q[part.long()] for part in torch.split(x, TEST_BATCH)])

    def train_x(self, chosen: Tensor, step: int) -> Int8Tensor:
        return Int8Tensor(self.train_q[chosen], self.table.exponent)

    def test_x(self, part: slice) -> Int8Tensor:
        return Int8Tensor(self.test_q[part], self.table.exponent)


class FloatClouds(Inputs[Tensor]):
    """`[B, 3, points]`: the first points of each cloud, augmented in training."""

    test_batch = CLOUD_TEST_BATCH

    def __init__(self, config: TrainConfig, data: CloudData) -> None:
        super().__init__(config, data)
        assert config.points is not None
        self.seed, self.up, self.augment = config.seed, data.up, config.augment
        self.backend = config.backend
        self.train_points = data.train_x[:, : config.points]
        self.test_points = data.test_x[:, : config.points]

    def train_x(self, chosen: Tensor, step: int) -> Tensor:
        x = self.train_points[chosen]
        if self.augment:
            x = augment_clouds(x, seed=self.seed, step=step, up=self.up, backend=self.backend)
        return x.transpose(1, 2).contiguous()

    def test_x(self, part: slice) -> Tensor:
        return self.test_points[part].transpose(1, 2).contiguous()


class Int8Clouds(Inputs[Int8Tensor]):
    """The same in int8, with the exponent of the training set (-7 in the unit sphere); what
    augmentation moves beyond its range is clipped."""

    test_batch = CLOUD_TEST_BATCH

    def __init__(self, config: TrainConfig, data: CloudData) -> None:
        super().__init__(config, data)
        self.floats = FloatClouds(config, data)
        whole = quantize(self.floats.train_points)
        self.exponent = whole.exponent
        self._value = int(whole.exponent)
        self.train_q = None if config.augment else whole.q.transpose(1, 2).contiguous()
        test = quantize(self.floats.test_points, exponent=self._value)
        self.test_q = test.q.transpose(1, 2).contiguous()

    def train_x(self, chosen: Tensor, step: int) -> Int8Tensor:
        if self.train_q is not None:
            return Int8Tensor(self.train_q[chosen], self.exponent)
        return quantize(self.floats.train_x(chosen, step), exponent=self._value)

    def test_x(self, part: slice) -> Int8Tensor:
        return Int8Tensor(self.test_q[part], self.exponent)


def float_inputs(config: TrainConfig, data: Samples) -> Inputs[Tensor]:
    """Of precision fp32 and bf16."""
    return FloatClouds(config, data) if isinstance(data, CloudData) else FloatImages(config, data)


def int8_inputs(config: TrainConfig, data: Samples) -> Inputs[Int8Tensor]:
    """Of precision int8."""
    return Int8Clouds(config, data) if isinstance(data, CloudData) else Int8Images(config, data)
