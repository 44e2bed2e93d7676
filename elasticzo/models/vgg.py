"""VGG-11 for 32x32 images (Simonyan and Zisserman 2014, column A), one linear layer at its end."""

from __future__ import annotations

from torch import Tensor, nn

from elasticzo.models.first_weights import kaiming_

# Channels of the convolutions in multiples of `width`; 0 is a 2x2 max-pooling.
PLAN = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)


class VGG11(nn.Module):
    """Eight 3x3 convolutions, each with its ReLU, five 2x2 poolings, one linear layer.

    One `nn.Sequential` holds them, so that a kernel can apply ReLU and pooling with its
    convolution. No BatchNorm: rows of a batch do not meet.

    Args:
        classes: of the output.
        channels: of the input.
        width: channels of the first convolution; the last has eight times as many.
    Shapes: `[B, channels, 32, 32]` -> `[B, classes]`.
    Initialisation: Kaiming normal (fan in, ReLU), zero biases.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = channels
        for factor in PLAN:
            if factor == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inner, factor * width, 3, padding=1), nn.ReLU()]
            inner = factor * width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inner, classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))  # type: ignore[no-any-return]
