"""Networks of the paper, and larger ones to scale the method to."""

from elasticzo.models.cnn import SmallCNN
from elasticzo.models.lenet import LeNet5
from elasticzo.models.pointnet import PointNet
from elasticzo.models.points import MaxPoints
from elasticzo.models.resnet import ResNet20
from elasticzo.models.vgg import VGG11

__all__ = ["VGG11", "LeNet5", "MaxPoints", "PointNet", "ResNet20", "SmallCNN"]
