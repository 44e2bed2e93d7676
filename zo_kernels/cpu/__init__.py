"""Fast CPU twins in numba: the same ops, 40 times faster than the reference's int64 Philox."""

from zo_kernels.cpu.int8 import (
    int8_perturbed_weights,
    int8_range,
    int8_requantize,
    int8_update_,
    integer_cross_entropy,
    integer_projected_sign,
    integer_softmax_error,
)
from zo_kernels.cpu.ops import perturb_, perturbed_weights, sample, update_
from zo_kernels.cpu.paired_linear import paired_linear
from zo_kernels.cpu.stage import stage_

__all__ = [
    "int8_perturbed_weights",
    "int8_range",
    "int8_requantize",
    "int8_update_",
    "integer_cross_entropy",
    "integer_projected_sign",
    "integer_softmax_error",
    "paired_linear",
    "perturb_",
    "perturbed_weights",
    "sample",
    "stage_",
    "update_",
]
