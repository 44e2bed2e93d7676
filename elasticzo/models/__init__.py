"""Networks of the paper, and larger ones to scale the method to."""

from elasticzo.models.lenet import LeNet5
from elasticzo.models.resnet import ResNet20

__all__ = ["LeNet5", "ResNet20"]
