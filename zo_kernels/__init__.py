"""Kernels for zeroth-order training: seeded noise, perturbed weights, the in-place update.

Every op exists as a Triton kernel (CUDA), a plain torch reference (anywhere) and, where it pays,
a fast CPU twin (numba). `backend=` forces one; `resolve_backend` says which one would run.
"""

from zo_kernels._lib import BACKENDS, resolve_backend
from zo_kernels.int8_conv2d_gradient import int8_conv2d_gradient
from zo_kernels.int8_conv2d_max_pool import int8_conv2d_max_pool
from zo_kernels.int8_gradient_update import int8_gradient_update_
from zo_kernels.int8_matmul import int8_matmul
from zo_kernels.int8_paired_conv1d import int8_paired_conv1d
from zo_kernels.int8_paired_conv1d_max import int8_paired_conv1d_max
from zo_kernels.int8_paired_conv2d import int8_paired_conv2d
from zo_kernels.int8_paired_linear import int8_paired_linear
from zo_kernels.int8_perturbed_weights import int8_perturbed_weights
from zo_kernels.int8_range import int8_range
from zo_kernels.int8_requantize import int8_requantize
from zo_kernels.int8_unpool import int8_unpool
from zo_kernels.int8_update import int8_update_
from zo_kernels.integer_cross_entropy import integer_cross_entropy
from zo_kernels.integer_projected_sign import integer_projected_sign
from zo_kernels.integer_softmax_error import integer_softmax_error
from zo_kernels.paired_batch_norm import paired_batch_norm
from zo_kernels.paired_conv1d import paired_conv1d
from zo_kernels.paired_conv2d import paired_conv2d
from zo_kernels.paired_cross_entropy import paired_cross_entropy, paired_cross_entropy_backward
from zo_kernels.paired_layer_norm import paired_layer_norm
from zo_kernels.paired_linear import paired_linear
from zo_kernels.perturb import perturb_
from zo_kernels.perturbed_weights import perturbed_weights
from zo_kernels.reference.rules import apply_rule_
from zo_kernels.rules import RULES, Rule
from zo_kernels.sample import sample
from zo_kernels.stage import stage_
from zo_kernels.update import update_

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
