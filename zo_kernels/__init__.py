"""Kernels for zeroth-order training: seeded noise, perturbed weights, the in-place update.

Every op exists as a Triton kernel (CUDA), a plain torch reference (anywhere) and, where it pays,
a fast CPU twin (numba). `backend=` forces one; `resolve_backend` says which one would run.
"""

from zo_kernels.ops.batch_norm import paired_batch_norm
from zo_kernels.ops.conv import paired_conv1d, paired_conv2d
from zo_kernels.ops.cross_entropy import paired_cross_entropy, paired_cross_entropy_backward
from zo_kernels.ops.int8_conv import int8_paired_conv1d, int8_paired_conv1d_max, int8_paired_conv2d
from zo_kernels.ops.int8_linear import int8_paired_linear
from zo_kernels.ops.int8_loss import (
    integer_cross_entropy,
    integer_projected_sign,
    integer_softmax_error,
)
from zo_kernels.ops.int8_range import int8_range, int8_requantize
from zo_kernels.ops.int8_tail import (
    int8_conv2d_gradient,
    int8_conv2d_max_pool,
    int8_gradient_update_,
    int8_matmul,
    int8_unpool,
)
from zo_kernels.ops.int8_weights import int8_perturbed_weights, int8_update_
from zo_kernels.ops.layer_norm import paired_layer_norm
from zo_kernels.ops.linear import paired_linear
from zo_kernels.ops.noise import sample
from zo_kernels.ops.rules import apply_rule_
from zo_kernels.ops.stage import stage_
from zo_kernels.ops.update import update_
from zo_kernels.ops.weights import perturb_, perturbed_weights
from zo_kernels.registry import BACKENDS, resolve_backend
from zo_kernels.rules import RULES, Rule

__all__ = [
    "BACKENDS",
    "RULES",
    "Rule",
    "apply_rule_",
    "int8_conv2d_gradient",
    "int8_conv2d_max_pool",
    "int8_gradient_update_",
    "int8_matmul",
    "int8_paired_conv1d",
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
    "paired_conv1d",
    "paired_conv2d",
    "paired_cross_entropy",
    "paired_cross_entropy_backward",
    "paired_layer_norm",
    "paired_linear",
    "perturb_",
    "perturbed_weights",
    "resolve_backend",
    "sample",
    "stage_",
    "update_",
]
