"""The same ops in plain torch, file for file: the specification. Imports no Triton."""

from zo_kernels.reference.paired_linear import paired_linear
from zo_kernels.reference.perturb import perturb_
from zo_kernels.reference.perturbed_weights import perturbed_weights
from zo_kernels.reference.sample import sample
from zo_kernels.reference.stage import stage_
from zo_kernels.reference.update import update_

__all__ = ["paired_linear", "perturb_", "perturbed_weights", "sample", "stage_", "update_"]
