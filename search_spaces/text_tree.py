"""Show an architecture as a tree for the terminal: where branches part, the tree does."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.plan import NetworkPlan, Step


def architecture_tree(layout: Layout, plan: NetworkPlan) -> Tree:
    """Build a tree with a node for each cell: the shared prefix first, then the branches below where they part.

    Args:
        layout: The space.
        plan: The network.
    """
    finest = layout.scales[0]
    root = Tree(
        Text.assemble(
            ("stem ", "bold"), layout.stem, f"  1/{finest}  χ {plan.end_width} · {plan.end_width * finest} ch"
        )
    )
    following: dict[int | None, list[int]] = {}
    for index, step in enumerate(plan.steps):
        following.setdefault(step.source, []).append(index)
    _grow(root, plan, following, None)
    return root


def _grow(node: Tree, plan: NetworkPlan, following: dict[int | None, list[int]], source: int | None) -> None:
    # Cells in a row stay on one level, so that a network of sixteen layers does not drift off the screen.
    while True:
        finals = [scale for scale, index in plan.outputs.items() if index == source]
        for scale in finals:
            node.add(Text.assemble(("head ", "bold"), f"takes branch 1/{scale}"))
        steps = following.get(source, [])
        if len(steps) == 1 and not finals:
            source = steps[0]
            node.add(_label(plan.steps[source]))
            continue
        for index in steps:
            branch = node.add(_label(plan.steps[index]))
            _grow(branch, plan, following, index)
        return


def _label(step: Step) -> Text:
    arrow = "↘" if step.stride == 2 else "→"
    shared = f"  shared by {', '.join(f'1/{scale}' for scale in step.branches)}" if len(step.branches) > 1 else ""
    return Text.assemble(
        f"layer {step.cell.layer:>2}  1/{step.cell.scale} {arrow} 1/{step.out_scale}  ",
        (step.operator, "cyan"),
        f"  χ {step.width} · {step.out_channels} ch",
        (shared, "magenta"),
    )
