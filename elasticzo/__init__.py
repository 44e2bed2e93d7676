"""ElasticZO: zeroth-order training of a network's head, backpropagation for its tail."""

from elasticzo.capture import CapturedStep, capture_step
from elasticzo.estimator import Estimator, low_rank, one_sided, spsa
from elasticzo.feedback import Feedback
from elasticzo.forward.trees import unbatched
from elasticzo.losses import pair_losses
from elasticzo.optim import ZOSGD, ZOAdam, ZOSign
from elasticzo.ownership import unwrap
from elasticzo.trajectory import TrajectoryLog, read_trajectory, replay
from elasticzo.wrapper import ElasticZO

__version__ = "0.1.0"

__all__ = [
    "ZOSGD",
    "CapturedStep",
    "ElasticZO",
    "Estimator",
    "Feedback",
    "TrajectoryLog",
    "ZOAdam",
    "ZOSign",
    "capture_step",
    "low_rank",
    "one_sided",
    "pair_losses",
    "read_trajectory",
    "replay",
    "spsa",
    "unbatched",
    "unwrap",
]
