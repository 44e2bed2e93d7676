"""ElasticZO: zeroth-order training of a network's head, backpropagation for its tail."""

from elasticzo.capture import CapturedStep, capture_step
from elasticzo.losses import pair_losses
from elasticzo.optimizer import ZOSGD
from elasticzo.trajectory import TrajectoryLog, read_trajectory, replay
from elasticzo.trees import unbatched
from elasticzo.wrapper import ElasticZO

__version__ = "0.1.0"

__all__ = [
    "ZOSGD",
    "CapturedStep",
    "ElasticZO",
    "TrajectoryLog",
    "capture_step",
    "pair_losses",
    "read_trajectory",
    "replay",
    "unbatched",
]
