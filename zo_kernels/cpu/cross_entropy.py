"""CPU twin of `zo_kernels.paired_cross_entropy`: the reference, whose torch kernels suffice here.

Logits of a batch are few beside the products that make them.
"""

from zo_kernels.reference.cross_entropy import paired_cross_entropy as paired_cross_entropy
from zo_kernels.reference.cross_entropy import (
    paired_cross_entropy_backward as paired_cross_entropy_backward,
)
