"""The task raced by default: a small convolutional net on 1,797 real handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..extra import needs_extra
from .task import ParamGroups, Task

TEST_DIGITS = 360


class DigitsNet(nn.Module):
    """Three convolutions as the backbone, one linear layer as the head.

    Smooth throughout, as LeNet was: at a kink (ReLU, max pooling) the last bit of a rounding can
    turn into a visible difference some hundred steps later, so that not even two implementations
    within torch end alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, rows x 10, of images, rows x 1 x 8 x 8."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def backbone_and_head(model: nn.Module, lr: float) -> ParamGroups:
    """The head learns ten times faster than the backbone."""
    assert isinstance(model, DigitsNet)
    return [
        {"params": list(model.backbone.parameters()), "lr": lr},
        {"params": list(model.head.parameters()), "lr": 10 * lr},
    ]


def digits() -> Task:
    """The optical digits of the UCI repository, which ship inside scikit-learn.

    Source: https://archive.ics.uci.edu/dataset/80
    """
    with needs_extra("race"):
        from sklearn.datasets import load_digits
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    return Task(
        name="digits",
        model=DigitsNet,
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        loss=nn.functional.cross_entropy,
        groups=backbone_and_head,
        rates={"AdamW": 4e-3, "SGD": 8e-2},
    )
