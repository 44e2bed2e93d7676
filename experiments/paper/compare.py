"""What the study's results say: means, and differences taken seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.files import read_json
from experiments.paper.cells import WITH_HEAD
from experiments.paper.presets import ARITHMETICS
from experiments.train.recipes import CONTROLS, METHODS

METHOD_TITLES: Mapping[str, str] = {
    "full-zo": "Full ZO",
    "frozen-cls2": "control of Cls2",
    "cls2": "ZO-Feat-Cls2",
    "frozen-cls1": "control of Cls1",
    "cls1": "ZO-Feat-Cls1",
    "full-bp": "Full BP",
    "local": "a loss of its own for each layer",
}
ARITHMETIC_TITLES: Mapping[str, str] = {
    "fp32": "FP32",
    "int8": "INT8",
    "int8-float": "INT8, float loss",
}
SHORT_TITLES: Mapping[str, str] = {
    "full-zo": "Full ZO",
    "cls2": "Cls2",
    "cls1": "Cls1",
    "frozen-cls2": "its control",
    "frozen-cls1": "its control",
}
DATA_TITLES: Mapping[str, str] = {
    "digits": "Digits",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "modelnet10": "ModelNet10",
    "modelnet40": "ModelNet40",
}
# Of a results file.
PARTS = ("command", "seeds", "tasks", "tuning", "runs", "missing", "hardware", "commits")
MODEL_TITLES: Mapping[str, str] = {
    "lenet5": "LeNet-5",
    "cnn": "three convolutions",
    "pointnet": "PointNet",
    "resnet20": "ResNet-20",
    "vgg11": "VGG-11",
}


@dataclass(frozen=True)
class Mean:
    """Of accuracies in %, or of differences in points.

    Attributes:
        mean: of the seeds.
        sd: standard deviation (n - 1); None of a single seed.
        n: seeds.
    """

    mean: float
    sd: float | None
    n: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.sd is None else self.sd / float(self.n) ** 0.5


def mean_of(values: Sequence[float]) -> Mean | None:
    """None of no values."""
    if not values:
        return None
    sd = stdev(values) if len(values) > 1 else None
    return Mean(mean(values), sd, len(values))


@dataclass(frozen=True)
class Scene:
    """What is learnt: a data set from scratch, or rotated, from trained weights."""

    data: str
    model: str
    rotate: float | None = None

    @property
    def section(self) -> str:
        return "grid" if self.rotate is None else "finetune"

    @property
    def title(self) -> str:
        name = DATA_TITLES.get(self.data, self.data)
        return name if self.rotate is None else f"{name} turned {self.rotate:g}°"


class Runs:
    """The runs of one results file.

    Args:
        content: of paper_<preset>.json.
        preset: its name.
    Raises: ValueError where the file is of another layout.
    """

    def __init__(self, content: Mapping[str, Any], preset: str) -> None:
        self.content, self.preset = content, preset
        missing = [name for name in PARTS if name not in content]
        if missing:
            raise ValueError(
                f"paper_{preset}.json is not of a known layout: {missing[0]!r} is missing"
            )
        planned = [*content["runs"], *content["missing"]]
        self.scenes = [
            scene
            for task in content["tasks"]
            for scene in (
                Scene(task["data"], task["model"]),
                *(Scene(task["data"], task["model"], angle) for angle in task["rotations"]),
            )
        ]
        self.arithmetics = [a for a in ARITHMETICS if any(r["arithmetic"] == a for r in planned)]
        self.methods = [m for m in METHODS if any(r["method"] == m for r in planned)]

    def task(self, scene: Scene) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(t for t in self.content["tasks"] if t["data"] == scene.data)
        return found

    def rows(
        self, scene: Scene, arithmetic: str, method: str, directions: str | None = None
    ) -> list[Mapping[str, Any]]:
        """Finished runs; without a head to move both losses of int8 are one run."""
        wanted = {
            "section": scene.section,
            "data": scene.data,
            "rotate": scene.rotate,
            "arithmetic": "int8" if same_run(arithmetic, method) else arithmetic,
            "method": method,
            "directions": directions,
        }
        return [
            run for run in self.content["runs"] if all(run.get(k) == v for k, v in wanted.items())
        ]

    def accuracies(
        self, scene: Scene, arithmetic: str, method: str, directions: str | None = None
    ) -> dict[int, float]:
        """Test accuracy in % by seed."""
        rows = self.rows(scene, arithmetic, method, directions)
        return {row["seed"]: row["test_accuracy"] for row in rows}

    def mean(self, scene: Scene, arithmetic: str, method: str) -> Mean | None:
        return mean_of(list(self.accuracies(scene, arithmetic, method).values()))

    def before(self, scene: Scene, arithmetic: str) -> dict[int, float]:
        """Test accuracy in % by seed of the weights that fine-tuning starts from."""
        first: dict[int, float] = {}
        for method in self.methods:
            for row in self.rows(scene, arithmetic, method):
                if row.get("start_accuracy") is not None:
                    first.setdefault(row["seed"], row["start_accuracy"])
        return first

    def gain(self, scene: Scene, arithmetic: str, method: str, over: str) -> Mean | None:
        """Points of a method over another, seed by seed."""
        own = self.accuracies(scene, arithmetic, method)
        return paired(own, self.accuracies(scene, arithmetic, over))

    def difference(self, scene: Scene, method: str, arithmetic: str, less: str) -> Mean | None:
        """Points of an arithmetic over another, seed by seed."""
        own = self.accuracies(scene, arithmetic, method)
        return paired(own, self.accuracies(scene, less, method))

    def best(self, scene: Scene, arithmetic: str) -> str | None:
        """The better of Cls2 and Cls1: the higher mean test accuracy. None where one lacks."""
        found = {m: self.mean(scene, arithmetic, m) for m in CONTROLS}
        means = {m: value.mean for m, value in found.items() if value is not None}
        return max(means, key=lambda m: means[m]) if len(means) == len(CONTROLS) else None


def same_run(arithmetic: str, method: str) -> bool:
    """Whether the float loss of int8 changes nothing: no sign of a loss difference is used."""
    return arithmetic == "int8-float" and method not in WITH_HEAD


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> Mean | None:
    """Mean difference over the seeds that both have."""
    return mean_of([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])


def read_study(folder: Path, preset: str) -> Runs | None:
    """One study's results, where they are there."""
    path = folder / f"paper_{preset}.json"
    return Runs(read_json(path), preset) if path.exists() else None


def read_studies(folder: Path) -> list[Runs]:
    """The studies whose results are there; rehearsals are left out."""
    studies = (read_study(folder, preset) for preset in ("cpu", "gpu"))
    return [runs for runs in studies if runs is not None]


def accuracy_text(value: Mean | None, seeds: int) -> str:
    """Mean and standard deviation in %; in brackets how many seeds where it is not `seeds`."""
    return "not run" if value is None else f"{value.mean:.2f}{_spread(value.sd, value.n, seeds)}"


def gain_text(value: Mean | None, seeds: int) -> str:
    """Mean and standard error in points; in brackets how many seeds where it is not `seeds`."""
    return (
        "not run" if value is None else f"{value.mean:+.2f}{_spread(value.error, value.n, seeds)}"
    )


def _spread(spread: float | None, n: int, seeds: int) -> str:
    shown = "" if spread is None else f" ± {spread:.2f}"
    return shown + ("" if n == seeds else f" ({n})")
