"""The configuration of a training run: what a user may give, and what it resolves to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Model = Literal["lenet5", "cnn", "resnet20", "pointnet"]
Data = Literal["digits", "mnist", "fashion-mnist", "cifar10", "modelnet10", "modelnet40"]
Method = Literal["full-zo", "cls2", "cls1", "full-bp", "frozen-cls2", "frozen-cls1", "local"]
Schedule = Literal["constant", "cosine", "linear", "step"]
Directions = Literal[
    "weight", "rank1", "sample", "node", "auto",
    "feedback", "feedback-zero", "feedback-random", "feedback-exact", "feedback-exact-zero",
]  # fmt: skip
MAX_THREADS = 1024  # the system does not start any number of them, and torch does not survive that
# A flag that the recipe decides where it is not given: --name or --no-name.
Flag = Annotated[bool | None, tyro.conf.arg(constructor=bool)]


@dataclass(frozen=True)
class TrainConfig:
    """Train a network by zeroth-order optimisation (head) and backpropagation (tail).

    Where a default is None, the recipe of the method decides (experiments/train/recipes.py); the
    resolved configuration is printed and stored. The same command goes on where a killed run stood.
    """

    model: Model = "lenet5"
    """Network: lenet5 for 28x28 images, cnn for cifar10, resnet20 for both, pointnet for clouds."""
    data: Data = "digits"
    """Images, or clouds of points (modelnet*); digits comes with scikit-learn, the others are read
    from data_dir."""
    data_dir: Path | None = None
    """Folder of the IDX files of mnist or fashion-mnist (or of torchvision's layout), of cifar10's
    batches (python version), or of the HDF5 files of modelnet10 or modelnet40."""
    download: bool = False
    """Fetch missing files of an image set into data_dir."""
    method: Method = "cls2"
    """full-zo: ZO everywhere; cls2 / cls1: BP on the last one / two layers; full-bp: BP everywhere;
    frozen-*: the control, the same tail on a head that stays random; local: another one, BP inside
    of each layer for the loss of a classifier of its own."""
    tail: tuple[str, ...] | None = None
    """What BP trains, instead of the method's cut: module names, a number of layers, or all."""

    points: int | None = None
    """Clouds: the first so many points of each, >= 1. Default: 1024."""
    augment: Flag = None
    """Clouds: turn (up to 45 degrees about the vertical axis), shift and jitter those of a step."""
    batch_norm: Flag = None
    """pointnet and cnn: with BatchNorm; int8 has none."""
    init: Literal["kaiming", "orthogonal"] | None = None
    """Initial weights: the model's own (Kaiming normal), or orthogonal with gain sqrt(2)."""

    directions: Directions | None = None
    """By whose noise the head is learnt. weight: one direction of all its weights a batch, the
    paper's; rank1: one of rank one a batch; sample: one of rank one a sample; node: noise on the
    outputs of each layer, one a sample; auto: of these two the one that looks into fewer
    dimensions, layer by layer; feedback: errors that come back through matrices, learnt from noise
    on what the layers read, in two passes; feedback-exact: likewise, but through the head's last
    layers (of few activations) they come back by backpropagation; controls: feedback-zero and
    feedback-exact-zero (no matrices: what lies behind exact errors learns alone) and
    feedback-random (fixed random ones). Not with int8. Default: weight."""
    group: int = 1
    """Neighbouring samples that share a direction of sample or auto, >= 1."""
    noise: Literal["normal", "rademacher"] | None = None
    """Distribution of the perturbation z; feedback has signs."""
    queries: int = 1
    """Directions a step, Q >= 1; each costs two forward passes."""
    eps: float | None = None
    """Perturbation scale, > 0, in units of the weights."""
    head_lr: float | None = None
    """Learning rate of the head, >= 0: w -= lr * g * z."""
    head_optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Rule of the head, on the estimate of its gradient. Default: sgd for weight and rank1, adam
    for the others; another one wants its own head_lr."""
    head_momentum: float = 0.0
    """Momentum in [0, 1) of head_optimizer sgd."""
    scale: dict[str, float] | None = None
    """Per-layer scale s >= 0 of the perturbation by name pattern, e.g. --scale 'conv1.*' 2 'fc*' 0;
    the last pattern that matches wins; 0 leaves a layer alone. int8: of the share of weights that
    is perturbed."""
    clip: float | None = None
    """Bound on |g| of a batch, or of each sample, > 0, in loss per unit of z; inf is unbounded."""
    head_weight_decay: float = 0.0
    """Weight decay of the head, >= 0, per unit of learning rate."""
    head_schedule: Schedule | None = None
    """Learning rate of the head over the steps."""
    head_warmup: float | None = None
    """Share of the run, in [0, 1), in which the head's rate grows linearly."""

    tail_optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Optimiser of the tail."""
    tail_lr: float | None = None
    """Learning rate of the tail, >= 0."""
    tail_momentum: float | None = None
    """Momentum in [0, 1) of tail_optimizer sgd. Default: 0.9."""
    tail_weight_decay: float = 0.0
    """Weight decay of the tail, >= 0, as the optimiser defines it."""
    tail_source: Literal["mean", "plus", "minus", "clean"] | None = None
    """Which pass feeds the tail: the mean of the losses, the + or - half, or a third, unperturbed
    one (not with int8)."""
    tail_schedule: Schedule | None = None
    """Learning rate of the tail over the steps."""
    tail_warmup: float | None = None
    """Share of the run, in [0, 1), in which the tail's rate grows linearly."""
    step_epochs: int = 2
    """Epochs between two drops of the schedule step, >= 1."""
    step_gamma: float = 0.3
    """Factor of a drop of the schedule step, in (0, 1]."""

    batch_size: int = 64
    """Samples a step, >= 1; what is left over at the end of an epoch waits for another order."""
    epochs: int | None = None
    """Passes over the training set, >= 1. Default: 6; digits 60; clouds 30."""
    eval_epochs: int = 1
    """Epochs between two tests, >= 1; the last epoch is always tested."""
    seed: int = 0
    """Of weights, noise and data order, in [0, 2^63)."""
    train_images: int | None = None
    """Train on the first so many images (of clouds on a fixed pick) only, >= batch_size. Default:
    all."""
    hold_out: int = 0
    """Test on so many training samples that are kept out of training, in place of the test set."""
    rotate: float | None = None
    """Images: degrees, counter-clockwise, in [-360, 360]: all, training and test, turned by this
    one angle (bilinear, once). Default: as they are."""
    start_from: Path | None = None
    """Fine-tuning: folder of a finished run whose last weights are the first ones here. Of the same
    model and precision; int8 also takes an fp32 run, converted without its biases."""

    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """fp32, autocast to bf16 (weights, update and perturbation stay fp32), or int8: integers only,
    ElasticZO-INT8, for lenet5 and pointnet; what follows is for int8 alone, rates and eps for the
    others."""
    r_max: tuple[int, ...] | None = None
    """int8: largest perturbation of a weight, in [1, 127]. Of several values each serves an equal
    part of the run: --r-max 31 15 7."""
    p_zero: tuple[float, ...] | None = None
    """int8: share in [0, 1) of the weights that a step leaves alone; several as for r_max."""
    b_zo: tuple[int, ...] | None = None
    """int8: bits of an update of the head, in [0, 31]; several as for r_max."""
    b_bp: tuple[int, ...] | None = None
    """int8: bits of an update of the tail, in [-8, 7]; several as for r_max. Below 0 a weight moves
    by one unit at the most, and not always."""
    logit_shift: int | None = None
    """int8: the last layer's first weights are divided by 2 to this power, in [0, 16]."""
    loss: Literal["integer", "float"] | None = None
    """int8: cross-entropy in fixed point, or in float64 for comparison (its sign is used alone)."""
    fraction_bits: int | None = None
    """int8: fractional bits of the integer loss, in [0, 16]."""
    pairing: Literal["stacked", "sequential"] = "stacked"
    """Both halves as one batch, or one after the other (memory of inference)."""
    backend: Literal["auto", "triton", "numba", "reference"] = "auto"
    """What makes the noise; auto is triton on cuda, numba on the CPU where installed."""
    threads: int | None = None
    """Threads of torch on the CPU, in [1, 1024]; last bits depend on it. Default: torch's own."""

    out: Path | None = None
    """Folder of the run. Default: runs/<data>-<model>-<method>-<seed>, with the directions behind
    it where they are not weight."""
    checkpoint_steps: int = 500
    """Steps between two checkpoints, >= 1; one is written at the end, too."""
    log_steps: int = 20
    """Steps between two lines of metrics.jsonl, >= 1; each waits for the device once."""
    resume: bool = True
    """Go on where the checkpoint in out stands; --no-resume wants out to hold no run."""
    tensorboard: bool = True
    """Write curves for TensorBoard into out/tensorboard."""
    plot: bool = True
    """Draw out/curves.png at the end."""
    trajectory: bool = True
    """Write out/trajectory.jsonl, from which elasticzo.replay rebuilds the head; not with feedback,
    whose steps no log can say."""


# Where a run lives and how it reports: may differ between two starts of one run.
NOT_IDENTITY = frozenset({
    "data_dir", "download", "out", "checkpoint_steps", "resume", "tensorboard", "plot",
})  # fmt: skip

# What the paper does, of fields that are younger than stored runs, and that say nothing new there.
PAPER: Mapping[str, Any] = {
    "directions": "weight", "group": 1, "head_optimizer": "sgd", "head_momentum": 0.0,
}  # fmt: skip
