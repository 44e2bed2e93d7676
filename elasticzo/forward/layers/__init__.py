"""How each kind of module serves the points of a forward: a function in a file registers itself.

A new layer is one function under `@serves(nn.Kind)` in one file here, named below.
"""

from elasticzo.forward.layers import dropout, norms, weights
from elasticzo.forward.layers.registry import Handler, handler_of, serves

__all__ = ["Handler", "dropout", "handler_of", "norms", "serves", "weights"]
