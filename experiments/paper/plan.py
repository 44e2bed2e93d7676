"""From a run's name to its configuration, as far as what it needs is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.paper import cells as names
from experiments.paper.cells import Cell
from experiments.paper.presets import Preset
from experiments.paper.tuning import Changes, candidates, choose
from experiments.studies.study import in_own_folder
from experiments.train.config import TrainConfig
from experiments.train.resolve import resolve

PAPERS = "weight"  # directions of a cell that names none
Results = Mapping[Cell, Mapping[str, Any]]


@dataclass(frozen=True)
class Filter:
    """Which runs to do, by name; of what is empty, all."""

    sections: Sequence[str] = ()
    sets: Sequence[str] = ()
    arithmetics: Sequence[str] = ()
    methods: Sequence[str] = ()
    directions: Sequence[str] = ()

    def __call__(self, cell: Cell) -> bool:
        return (
            (not self.sections or _public(cell) in self.sections)
            and (not self.sets or cell.data in self.sets)
            and (not self.arithmetics or cell.arithmetic in self.arithmetics)
            and (not self.methods or cell.method in self.methods)
            and (not self.directions or (cell.directions or PAPERS) in self.directions)
        )


EVERYTHING = Filter()


class Plan:
    """All runs of a preset, in their order.

    Args:
        preset: the size of the study.
        data_dir: folder of the sets, each in a folder of its name or all in this one.
        out: folder of the runs; a finished one is not repeated.
    Raises: ValueError for a configuration that the training command refuses.
    """

    def __init__(self, preset: Preset, data_dir: Path | None, out: Path) -> None:
        self.preset, self.data_dir, self.out = preset, data_dir, out
        tuned = names.tuned_cells(preset) if preset.candidates > 1 else []
        self.candidates = {cell: self._candidates(cell) for cell in tuned}
        labels = [(cell, tuple(tried)) for cell, tried in self.candidates.items()]
        self.cells = names.all_cells(preset, labels)
        self._configs: dict[Cell, TrainConfig] = {}

    def waves(self, wanted: Filter = EVERYTHING) -> list[list[Cell]]:
        """The runs that are wanted with all that they need; a wave needs those before it."""
        chosen = names.with_needs([c for c in self.cells if wanted(c)], self.cells)
        waves = [[c for c in chosen if c.section in wave] for wave in names.WAVES]
        return [wave for wave in waves if wave]

    def steps(self, cell: Cell) -> int:
        """Steps of a run, about."""
        task = self.preset.task(cell.data)
        samples = min(task.tune_on, task.train) if cell.candidate else task.train
        epochs = task.finetune_epochs if cell.fine else task.epochs
        return epochs * max(1, samples // task.batch_size)

    # ---- settings

    def base(self, cell: Cell) -> TrainConfig:
        """The run with the recipe of its method, without a folder."""
        task = self.preset.task(cell.data)
        held_out = cell.candidate is not None or cell.section == "pretraining"
        epochs = task.finetune_epochs if cell.fine else task.epochs
        given: dict[str, Any] = {
            "model": cell.model,
            "data": cell.data,
            "data_dir": self._folder(cell.data),
            "method": cell.method,
            "directions": cell.directions,
            "seed": cell.seed,
            "epochs": epochs,
            "eval_epochs": 1 if cell.candidate is None else epochs,
            "batch_size": task.batch_size,
            "rotate": cell.rotate,
            "hold_out": task.hold_out if held_out else 0,
            "train_images": task.tune_on if cell.candidate is not None else None,
            "precision": "fp32" if cell.arithmetic == "fp32" else "int8",
            "loss": "float" if cell.arithmetic == "int8-float" else None,
            "start_from": Path("trained") if cell.fine else None,  # named by `config`
            "device": self.preset.device,
            "threads": self.preset.threads,
            **task.settings,
        }
        return resolve(TrainConfig(**given))

    def _folder(self, data: str) -> Path | None:
        own = self.data_dir / data if self.data_dir is not None else None
        return own if own is not None and own.is_dir() else self.data_dir

    def _candidates(self, cell: Cell) -> dict[str, Changes]:
        return candidates(self.base(cell), cell.fine, self.preset.candidates)

    def tried(self, cell: Cell, results: Results) -> dict[str, list[float]]:
        """Held-out accuracies of the settings of a method, by name; those that are there."""
        found: dict[str, list[float]] = {}
        for trial in names.trials(cell, self.cells):
            if trial in results:
                assert trial.candidate is not None
                found.setdefault(trial.candidate, []).append(results[trial]["test_accuracy"])
        return found

    def chosen(self, cell: Cell, results: Results) -> str | None:
        """The setting that tuning chose; None without tuning."""
        tried = self.tried(cell, results)
        return choose(tried) if tried else None

    def config(self, cell: Cell, results: Results) -> TrainConfig:
        """The run in its own folder.

        Args:
            results: of all that the cell needs; they do not change.
        """
        if cell not in self._configs:
            self._configs[cell] = self._configured(cell, results)
        return self._configs[cell]

    def _configured(self, cell: Cell, results: Results) -> TrainConfig:
        config = self.base(cell)
        label = cell.candidate or self.chosen(cell, results)
        if label is not None:
            config = replace(config, **self._changes(cell)[label])
        if cell.fine:
            config = replace(config, start_from=self.config(names.source(cell), results).out)
        return in_own_folder(config, self.out / cell.data)

    def _changes(self, cell: Cell) -> dict[str, Changes]:
        key = names.trials(cell, self.candidates)
        return self.candidates[key[0]]


def _public(cell: Cell) -> str:
    """The section by which a person asks for it."""
    return {"finetune-tuning": "tuning", "pretraining": "grid"}.get(cell.section, cell.section)
