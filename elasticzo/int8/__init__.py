"""ElasticZO-INT8: training in integer arithmetic only, the same bits on every machine."""

from elasticzo.int8.network import Int8Network
from elasticzo.int8.optimizer import Int8ZO
from elasticzo.int8.tail import Int8Tail
from elasticzo.int8.tensor import Int8Tensor, quantize
from elasticzo.int8.wrapper import ElasticZOInt8
from elasticzo.trajectory import TrajectoryLog as Int8TrajectoryLog
from elasticzo.trajectory import replay as replay_int8

__all__ = [
    "ElasticZOInt8",
    "Int8Network",
    "Int8Tail",
    "Int8Tensor",
    "Int8TrajectoryLog",
    "Int8ZO",
    "quantize",
    "replay_int8",
]
