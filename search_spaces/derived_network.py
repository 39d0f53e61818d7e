"""The network one architecture stands for: plain torch layers that need neither NNI nor this project once exported."""

from __future__ import annotations

import torch
from nni.nas.space import model_context
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.registry import operators
from glioma_nas.search_spaces.heads import AuxiliaryHeads, FusionHead, Stem
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.plan import NetworkPlan


class DerivedNetwork(nn.Module):
    """Run the chosen branches, sharing cells and features up to where they part, and merge them in one head.

    Args:
        plan: The cells and how they are joined.
        layout: Options of the space.
    """

    def __init__(self, plan: NetworkPlan, layout: Layout) -> None:
        super().__init__()
        self.plan = plan
        self.divisor = layout.divisor
        finals = layout.branch_sets[plan.branch_set]
        # Inside a model context NNI's mutable layers are created as the plain layers they stand for.
        with model_context({}):
            self.stem = Stem(layout.stem, layout.in_channels, plan.end_width * layout.scales[0], layout.scales[0])
            self.cells = nn.ModuleDict(
                {
                    step.name: operators.get(step.operator)(step.in_channels, step.out_channels, step.stride)
                    for step in plan.steps
                }
            )
            self.head = FusionHead(finals, plan.end_width, layout.head_channels, layout.n_classes)
            self.auxiliary = AuxiliaryHeads(finals, plan.end_width, layout.head_channels, layout.n_classes)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Segment a batch of slices.

        Args:
            x: Shape (N, C, H, W), float32, normalised; H and W divisible by twice the space's coarsest scale.

        Returns:
            In evaluation mode logits (N, K, H, W); in training mode a dict of such logits: ``logits`` and, for each
            final scale s, ``scale_s``.
        """
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]  # documented, but not in torch's own export list
            check_input(x, self.stem, self.divisor)
        stem = self.stem(x)
        features: list[Tensor] = []
        for step in self.plan.steps:
            features.append(self.cells[step.name](stem if step.source is None else features[step.source]))
        finals = {scale: features[index] for scale, index in self.plan.outputs.items()}
        logits: Tensor = self.head(*finals.values())
        if not self.training:
            return logits
        return {"logits": logits, **self.auxiliary(finals)}


def check_input(x: Tensor, stem: nn.Module, divisor: int) -> None:
    """Check the shape of a batch before convolutions fail on it with a message about something else.

    Raises:
        ArchitectureError: Not (N, C, H, W) with the right channels and a size divisible by ``divisor``.
    """
    channels = next(module.in_channels for module in stem.modules() if isinstance(module, nn.Conv2d))
    if x.ndim != 4 or x.shape[1] != channels:
        raise ArchitectureError(f"input of shape {tuple(x.shape)}: expected (N, {channels}, H, W)")
    if any(side % divisor or not side for side in x.shape[2:]):
        raise ArchitectureError(f"input of {x.shape[2]}x{x.shape[3]} pixels: both must be divisible by {divisor}")
