"""The same ops in plain torch, file for file: the specification. Imports no Triton."""

from zo_kernels.reference.paired_conv1d import paired_conv1d
from zo_kernels.reference.paired_conv2d import paired_conv2d
from zo_kernels.reference.paired_linear import paired_linear
from zo_kernels.reference.perturb import perturb_
from zo_kernels.reference.perturbed_weights import perturbed_weights
from zo_kernels.reference.sample import sample
from zo_kernels.reference.update import update_

__all__ = [
    "paired_conv1d",
    "paired_conv2d",
    "paired_linear",
    "perturb_",
    "perturbed_weights",
    "sample",
    "update_",
]
