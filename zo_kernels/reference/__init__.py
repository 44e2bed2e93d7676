"""The same ops in plain torch, file for file: the specification. Imports no Triton."""

from zo_kernels.reference.batch_norm import paired_batch_norm
from zo_kernels.reference.conv import paired_conv2d
from zo_kernels.reference.cross_entropy import paired_cross_entropy, paired_cross_entropy_backward
from zo_kernels.reference.int8_conv import int8_paired_conv1d_max, int8_paired_conv2d
from zo_kernels.reference.int8_linear import int8_paired_linear
from zo_kernels.reference.int8_loss import (
    integer_cross_entropy,
    integer_projected_sign,
    integer_softmax_error,
)
from zo_kernels.reference.int8_range import int8_range, int8_requantize
from zo_kernels.reference.int8_tail import (
    int8_conv2d_gradient,
    int8_conv2d_max_pool,
    int8_gradient_update_,
    int8_matmul,
    int8_unpool,
)
from zo_kernels.reference.int8_weights import int8_perturbed_weights, int8_update_
from zo_kernels.reference.layer_norm import paired_layer_norm
from zo_kernels.reference.linear import paired_linear
from zo_kernels.reference.noise import sample
from zo_kernels.reference.stage import stage_
from zo_kernels.reference.update import update_
from zo_kernels.reference.weights import perturb_, perturbed_weights

__all__ = [
    "int8_conv2d_gradient",
    "int8_conv2d_max_pool",
    "int8_gradient_update_",
    "int8_matmul",
    "int8_paired_conv1d_max",
    "int8_paired_conv2d",
    "int8_paired_linear",
    "int8_perturbed_weights",
    "int8_range",
    "int8_requantize",
    "int8_unpool",
    "int8_update_",
    "integer_cross_entropy",
    "integer_projected_sign",
    "integer_softmax_error",
    "paired_batch_norm",
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
