"""What is not searched cell by cell: the stem, and the head that belongs to a set of branches.

They are part of a network's latency, and a set of branches is a choice: heads of the thesis space differ by a sixth of
a network's time. Each is measured whole, like an operator; its name and sizes hold everything that decides its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nni.nas.space import model_context
from torch import nn

from glioma_nas.costs import OperatorSpec
from glioma_nas.search_spaces.heads import FusionHead, Stem
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.plan import NetworkPlan
from glioma_nas.search_spaces.supernet import PerArchitecture


def stem_spec(layout: Layout, end_width: int) -> OperatorSpec:
    """Return the stem with an output of width ``end_width``."""
    finest, side = layout.scales[0], layout.image_size_px
    return OperatorSpec(f"stem_{layout.stem}", layout.in_channels, end_width * finest, finest, side, side)


def head_spec(layout: Layout, branch_set: str, end_width: int) -> OperatorSpec:
    """Return the head of a set of branches; ``in_channels`` is the width χ of each branch, at its own scale."""
    side = layout.image_size_px
    name = f"head_{branch_set}_{layout.head_channels}_channels"
    return OperatorSpec(name, end_width, layout.n_classes, 1, side, side)


class FixedParts:
    """What a search space of this layout answers when its stem and heads are to be measured or compiled."""

    layout: Layout
    network: nn.Module | None
    stem: Any
    heads: Any
    auxiliary: Any

    def plan(self, sample: Mapping[str, Any]) -> NetworkPlan:
        """Read a sample; the space does it."""
        raise NotImplementedError

    def network_specs(self, sample: Mapping[str, Any]) -> list[OperatorSpec]:
        """Return the priced parts of one network: stem, operators, each shared one once, and head."""
        plan = self.plan(sample)
        return [
            stem_spec(self.layout, plan.end_width),
            *plan.specs(self.layout),
            head_spec(self.layout, plan.branch_set, plan.end_width),
        ]

    def fixed_part_specs(self) -> list[OperatorSpec]:
        """Return every stem and head that a network of this space can have."""
        ends, sets = self.layout.end_widths, self.layout.branch_sets
        return sorted(
            {stem_spec(self.layout, end) for end in ends}
            | {head_spec(self.layout, name, end) for name in sets for end in ends}
        )

    def build_component(self, spec: OperatorSpec) -> nn.Module | None:
        """Build a stem or head with new weights; none if ``spec`` is neither."""
        layout = self.layout
        with model_context({}):
            for end in layout.end_widths:
                if spec == stem_spec(layout, end):
                    return Stem(layout.stem, layout.in_channels, end * layout.scales[0], layout.scales[0])
                for name, scales in layout.branch_sets.items():
                    if spec == head_spec(layout, name, end):
                        return FusionHead(scales, end, layout.head_channels, layout.n_classes)
        return None

    def component_input_shapes(self, spec: OperatorSpec) -> list[tuple[int, ...]]:
        """Return the shapes of a component's inputs at batch 1: one, or one for each branch of a head."""
        for name, scales in self.layout.branch_sets.items():
            for end in self.layout.end_widths:
                if spec == head_spec(self.layout, name, end):
                    return [(1, end * s, self.layout.size_px(s), self.layout.size_px(s)) for s in scales]
        return [(1, spec.in_channels, spec.height, spec.width)]

    def parts_to_compile(self) -> list[nn.Module]:
        """Return what keeps its shapes from pass to pass: stems and heads of our supernet, a derived network whole.

        A cell's widths are drawn anew for every pass, and torch.compile would make a version for each pair of them.
        """
        if self.network is not None:
            return [self.network]
        parts = (self.stem, self.heads, self.auxiliary)
        return [copy for part in parts if isinstance(part, PerArchitecture) for copy in part.copies.values()]
