"""How much memory a step will hold, before anything runs; and the tail that fits a budget."""

from elasticzo.memory.liveness import (
    STATE_TENSORS,
    StepMemory,
    inference_memory,
    training_memory,
)

__all__ = ["STATE_TENSORS", "StepMemory", "inference_memory", "training_memory"]
