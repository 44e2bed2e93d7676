"""What the command may be asked, and how much of it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.commands import RESULTS

Section = Literal["cosine", "queries", "noise", "eps", "tail"]
SECTIONS: tuple[Section, ...] = ("cosine", "queries", "noise", "eps", "tail")


@dataclass(frozen=True)
class EstimatorConfig:
    """What the zeroth-order estimator does, for LeNet-5: short answers with plots.

    cosine: estimates averaged over q directions against the true gradient, by layer. queries:
    accuracy against forward passes spent. noise: normal against Rademacher. eps: error of g
    against the exact derivative along z. tail: which pass feeds the tail. Short runs are cached in
    out: an interrupted command goes on where it stood.
    """

    data_dir: Path | None = None
    """Folder of the image files; not needed for digits."""
    data: Literal["digits", "mnist", "fashion-mnist"] = "mnist"
    """Image set."""
    only: tuple[Section, ...] = SECTIONS
    """Sections to do; the others stay in the results as they are."""
    reduced: bool = False
    """Rehearse: a few images and directions, results without meaning."""
    seeds: int = 3
    """Short runs of seeds 0 to seeds - 1, >= 1."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int = 1
    """CPU threads of torch, >= 1."""
    out: Path = Path("runs/estimator")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of estimator_<data>.json and .png."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    train_images, epochs, hold_out, batch: of a short run, tested on held-out training images.
    directions, queries: of the cosines; directions a multiple of the last q.
    pass_images, passes_queries: accuracy against passes: `max(q) / q` epochs of so many images.
    lr_factors: of each q, on the recipe's rate times q ** 0.75.
    slopes, epss: directions and eps of the errors of g; run_epss of short runs (the recipe's, too).
    tail_batches, population: batches of the tail's gradients, images of its "whole" gradient.
    """

    train_images: int = 12_800
    epochs: int = 2
    hold_out: int = 5_000
    batch: int = 32
    directions: int = 1024
    queries: tuple[int, ...] = (1, 4, 16, 64, 256)
    noise_directions: int = 512
    noise_queries: tuple[int, ...] = (1, 4, 16, 64)
    pass_images: int = 4_000
    passes_queries: tuple[int, ...] = (1, 4, 16)
    lr_factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    slopes: int = 64
    epss: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    run_epss: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    tail_batches: int = 64
    population: int = 5_000


REDUCED = Sizes(
    train_images=128,
    epochs=1,
    hold_out=100,
    batch=32,
    directions=8,
    queries=(1, 4),
    noise_directions=4,
    noise_queries=(1, 4),
    pass_images=64,
    passes_queries=(1, 2),
    lr_factors=(1.0, 2.0),
    slopes=4,
    epss=(1e-5, 1e-1),
    run_epss=(1e-3,),
    tail_batches=2,
    population=100,
)


def sizes_of(config: EstimatorConfig) -> Sizes:
    return REDUCED if config.reduced else Sizes()
