"""What the sections share: short runs, networks before and after one, the bar over the whole."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor
from torch.nn.functional import cross_entropy

from elasticzo import unwrap
from elasticzo.checkpoint import load_checkpoint
from experiments.estimator.probe import Probe, stats
from experiments.estimator.settings import EstimatorConfig, Sizes, sizes_of
from experiments.studies.study import in_own_folder, run_all, shared
from experiments.train.config import Method, TrainConfig
from experiments.train.data import load_data
from experiments.train.folder import CHECKPOINT, metrics_of
from experiments.train.learner import FloatLearner
from experiments.train.network import library_tail

COMMAND = "python -m experiments.estimator"
STATES = ("untrained", "trained")
Key = TypeVar("Key", bound=Hashable)
Result = dict[str, Any]


def passes_of(config: TrainConfig) -> int:
    """Forward passes of a batch that the steps of a run take (three where one is clean)."""
    assert config.train_images is not None and config.epochs is not None
    steps = config.train_images // config.batch_size * config.epochs
    return steps * (2 * config.queries + (config.tail_source == "clean"))


@dataclass
class Bench:
    """One run of the command; `whole` counts forward passes."""

    config: EstimatorConfig
    console: Console
    progress: Progress
    whole: TaskID

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.config)

    def told(self, passes: int) -> None:
        """Forward passes were done."""
        self.progress.advance(self.whole, passes)

    # ---- short runs

    def short(self, method: Method, seed: int = 0, **changes: Any) -> TrainConfig:
        """A short run of the method's recipe on held-out images, in its folder."""
        config, sizes = self.config, self.sizes
        settings = shared(config) | {
            "train_images": sizes.train_images,
            "hold_out": sizes.hold_out,
            "batch_size": sizes.batch,
            "epochs": sizes.epochs,
            "eval_epochs": sizes.epochs,
        }
        made = TrainConfig(method=method, seed=seed, **settings | changes)
        return in_own_folder(made, config.out / config.data)

    def train(self, runs: Mapping[Key, TrainConfig]) -> dict[Key, Result]:
        """Train what is not finished yet."""
        results = run_all(runs, COMMAND, self.console, self.progress)
        self.told(sum(map(passes_of, runs.values())))
        return results

    def accuracies(
        self, method: Method, settings: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Result]:
        """Accuracy of short runs of every seed, by what differs from the recipe."""
        found = {}
        for label, changes in settings.items():
            runs = {
                (method, label, seed): self.short(method, seed, **changes)
                for seed in range(self.config.seeds)
            }
            values = [result["test_accuracy"] for result in self.train(runs).values()]
            found[label] = {"accuracies": values, **stats(values)}
        return found

    def tests(self, run: TrainConfig) -> list[Result]:
        """The lines of a finished run's tests."""
        assert run.out is not None
        return metrics_of(run.out, "test")

    # ---- networks to look at

    def run_passes(self, settings: int, queries: int = 1) -> int:
        """Forward passes of so many short runs a seed: for the bar."""
        steps = self.sizes.train_images // self.sizes.batch * self.sizes.epochs
        return settings * self.config.seeds * steps * 2 * queries

    def learner(self, method: Method, state: str) -> FloatLearner:
        """What a run of seed 0 learns with, "untrained" or after the short run ("trained")."""
        run = self.short(method)
        if state == "trained":
            run_all({method: run}, COMMAND, Console(quiet=True), self.progress)
        learner = FloatLearner(run, load_data(run))
        if state == "trained":
            assert isinstance(run.out, Path)
            learner.load(load_checkpoint(run.out / CHECKPOINT))
        return learner

    def probe(self, learner: FloatLearner) -> Probe:
        """Its network and the first batch of the next epoch's order."""
        config = learner.config
        assert config.tail is not None
        x, y = batch(learner, 0)
        net = unwrap(copy.deepcopy(learner.model.module))
        for p in net.parameters():
            p.requires_grad_(True)
        return Probe(net, library_tail(config.tail), x, y, cross_entropy)


def batch(learner: FloatLearner, number: int) -> tuple[Tensor, Tensor]:
    """A batch of the run's order, counted from the learner's present step."""
    return learner.inputs.train(learner.step_index + number)


def variants(learner: FloatLearner) -> dict[str, dict[str, Any]]:
    """Perturbations to compare: the recipe's, its eps without scales, and a small eps."""
    config = learner.config
    assert config.scale is not None
    return {
        "recipe": {"eps": config.eps, "scale": config.scale},
        "no scales": {"eps": config.eps, "scale": {}},
        "no scales, eps 1e-3": {"eps": 1e-3, "scale": {}},
    }
