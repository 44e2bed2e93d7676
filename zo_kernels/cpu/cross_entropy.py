"""CPU twin of `zo_kernels.paired_cross_entropy`: the reference, whose torch kernels suffice here.

Logits of a batch are few beside the products that make them.
"""
