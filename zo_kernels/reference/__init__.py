"""The same ops in plain torch, file for file: the specification. Imports no Triton."""

from zo_kernels.reference.paired_batch_norm import paired_batch_norm
from zo_kernels.reference.paired_conv1d import paired_conv1d
from zo_kernels.reference.paired_conv2d import paired_conv2d
from zo_kernels.reference.paired_cross_entropy import (
    paired_cross_entropy,
    paired_cross_entropy_backward,
)
from zo_kernels.reference.paired_layer_norm import paired_layer_norm
from zo_kernels.reference.paired_linear import paired_linear
from zo_kernels.reference.perturb import perturb_
from zo_kernels.reference.perturbed_weights import perturbed_weights
from zo_kernels.reference.sample import sample
from zo_kernels.reference.stage import stage_
from zo_kernels.reference.update import update_

__all__ = [
    "paired_batch_norm",
    "paired_conv1d",
    "paired_conv2d",
    "paired_cross_entropy",
    "paired_cross_entropy_backward",
    "paired_layer_norm",
    "paired_linear",
    "perturb_",
    "perturbed_weights",
    "sample",
    "stage_",
    "update_",
]
