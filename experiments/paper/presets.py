"""How large the study is: which sets, methods and seeds, and how long each run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from elasticzo.data import CLOUD_SETS
from experiments.train.config import Data, Directions, Method, Model
from experiments.train.recipes import METHODS

Arithmetic = Literal["fp32", "int8", "int8-float"]
# int8 takes the sign of the integer loss, int8-float that of the loss in float64.
ARITHMETICS: tuple[Arithmetic, ...] = ("fp32", "int8", "int8-float")


@dataclass(frozen=True)
class Task:
    """A model on a data set, and how long its runs are."""

    data: Data
    model: Model
    train: int
    """Samples of the training set, about: for the estimate of the time left."""
    epochs: int
    """Passes of a run of the grid and of the tuning."""
    batch_size: int = 64
    hold_out: int = 5_000
    """Training samples that tuning is tested on."""
    tune_on: int = 55_000
    """Training samples that tuning learns from: all that are left, since shorter runs choose rates
    at which a whole run falls (docs/decisions.md)."""
    rotations: tuple[float, ...] = ()
    """Angles of the fine-tuning in degrees, of images alone; it is tuned at the first."""
    finetune_epochs: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `TrainConfig` for all runs."""

    def __post_init__(self) -> None:
        if self.rotations and self.data in CLOUD_SETS:
            raise ValueError(
                f"rotations belong to images, got {self.rotations} with {self.data!r}: clouds are "
                "not fine-tuned here"
            )


@dataclass(frozen=True)
class Preset:
    """One size of the study."""

    name: str
    tasks: tuple[Task, ...]
    seeds: int = 3
    """Seeds 0 to seeds - 1 of the grid and of the fine-tuning."""
    tuning_seeds: int = 2
    """Other seeds, of the tuning."""
    candidates: int = 5
    """Settings tried for each method, arithmetic and set, 1 to 5; 1 is no tuning."""
    methods: tuple[Method, ...] = METHODS
    arithmetics: tuple[Arithmetic, ...] = ARITHMETICS
    directions: Mapping[Method, tuple[Directions, ...]] = field(default_factory=dict)
    """By whose noise heads learn; those of methods that are not named by the paper's."""
    device: str = "cpu"
    threads: int | None = 1

    def task(self, data: str) -> Task:
        return next(task for task in self.tasks if task.data == data)


DIGITS = Task(
    "digits",
    "lenet5",
    1_438,
    epochs=2,
    batch_size=32,
    hold_out=200,
    tune_on=400,
    rotations=(30.0,),
)
MNIST = Task("mnist", "lenet5", 60_000, epochs=6, rotations=(30.0, 45.0))
FASHION = replace(MNIST, data="fashion-mnist")
# An eighth of the points: 19 million products a cloud, beside LeNet-5's 0.7 an image.
MODELNET10 = Task(
    "modelnet10",
    "pointnet",
    3_980,
    epochs=8,
    batch_size=32,
    hold_out=500,
    tune_on=3_480,
    settings={"points": 128},
)
CIFAR10 = Task("cifar10", "cnn", 30_000, epochs=6, tune_on=25_000)
MODELNET40 = Task(
    "modelnet40", "pointnet", 9_840, epochs=100, batch_size=32, hold_out=984, tune_on=8_856
)


def _full_length(task: Task) -> Task:
    return replace(task, epochs=100, finetune_epochs=20, batch_size=256)


PRESETS: Mapping[str, Preset] = {
    "smoke": Preset(
        "smoke",
        (DIGITS,),
        seeds=1,
        tuning_seeds=1,
        candidates=2,
        methods=("full-zo", "frozen-cls2", "cls2", "full-bp"),
    ),
    # Three settings of each method, its recipe, half and twice its rate, on one seed.
    "cpu": Preset("cpu", (MNIST, FASHION, MODELNET10), seeds=3, tuning_seeds=1, candidates=3),
    # Learning from every sample, with the controls of feedback; the paper's methods are in cpu.
    "samples": Preset(
        "samples",
        (MNIST, FASHION, MODELNET10, CIFAR10),
        seeds=3,
        tuning_seeds=1,
        candidates=3,
        methods=(*METHODS, "local"),
        arithmetics=("fp32",),
        directions={
            "cls2": (
                *("feedback", "feedback-zero", "feedback-random"),
                *("feedback-exact", "feedback-exact-zero", "auto"),
            ),
            "cls1": ("feedback", "feedback-exact", "feedback-exact-zero", "auto"),
            "full-zo": ("feedback", "auto"),
        },
    ),
    "gpu": Preset(
        "gpu",
        (_full_length(MNIST), _full_length(FASHION), MODELNET40),
        seeds=5,
        tuning_seeds=2,
        candidates=5,
        device="cuda",
        threads=None,
    ),
}
