"""The last layer of a marker network: one logit from image features (or opinions of several scales), age and sex.

As a function it is one fully connected layer over their concatenation (METHOD §8 and §9). As something to be trained it
differs: an optimiser such as Adam moves every weight by about the learning rate a step, whatever the gradient's size.
Age in hundreds of years varies by 0.2 between patients, so its weight has to grow to about 5 before age counts, which
takes 5000 steps at the usual rate; a study of 50 patients has a few hundred. Age and sex therefore enter centred and
multiplied by `METADATA_GAIN`, and their weights start at 0, so that they do not speak for a class by accident.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

METADATA_CENTRE = 0.5
"""50 years, and neither sex."""

METADATA_GAIN = 30.0


class MetadataHead(nn.Module):
    """W·features + b + V·g·(metadata - ½) with V = 0 at first.

    Args:
        features: Length of the features.
        metadata: Use age and sex.
        start: ``random``: W as in any linear layer; ``mean``: W = 1/features and b = 0, for features that are logits
            already. Random signs would turn those round, and a short training is too short to turn them back.
    """

    def __init__(self, features: int, *, metadata: bool, start: Literal["random", "mean"] = "random") -> None:
        super().__init__()
        self.features = nn.Linear(features, 1)
        if start == "mean":
            nn.init.constant_(self.features.weight, 1.0 / features)
            nn.init.zeros_(self.features.bias)
        self.metadata: nn.Linear | None = None
        if metadata:
            self.metadata = nn.Linear(2, 1, bias=False)
            nn.init.zeros_(self.metadata.weight)

    def forward(self, features: Tensor, metadata: Tensor) -> Tensor:
        """Return logits (N,) of features (N, F) and metadata (N, 2), age/100 and sex in [0, 1]."""
        logits: Tensor = self.features(features)
        if self.metadata is not None:
            logits = logits + self.metadata(METADATA_GAIN * (metadata - METADATA_CENTRE))
        return torch.squeeze(logits, dim=1)
