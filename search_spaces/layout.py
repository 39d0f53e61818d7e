"""The shape of a NASBraNet search space: its options, cells, labels and size. Knows neither torch nor NNI.

Cells lie on a grid of scales (absolute downsampling rates) and layers. Cell (s, l) exists from layer index(s)+1 on; its
input node receives the keep output of (s, l-1) and the down output of (s/2, l-1), where these exist.

Reference: METHOD §2 (the counts); Liu et al., Auto-DeepLab, CVPR 2019; Chen et al., FasterSeg, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

from glioma_nas.errors import ArchitectureError, did_you_mean

THESIS_OPERATORS = ("skip", "conv3x3", "conv3x3_x2", "zoomed_conv", "zoomed_conv_x2")

FROM_FINER, FROM_SAME = 0, 1
"""Order of a node's two inputs: the down output of s/2 first (β⁰), the keep output of s second (β¹), as in eq. 4-3."""

ENDS_LABEL = "width_ends"
BRANCHES_LABEL = "branches"
KEPT_SKIPS = "kept_skips"
DOWN_OPERATORS = "down_operators"
REFINEMENTS = (KEPT_SKIPS, DOWN_OPERATORS)
"""Optional keys of a sample beyond NNI's labels: what an NNI sample cannot say (see `plan`)."""

_BASE: dict[str, Any] = {
    "n_layers": 16,
    "scales": (2, 4, 8),
    "widths": (16, 24, 32, 40, 48),
    "end_widths": (32, 48),
    "n_branches": 2,
    "operators": THESIS_OPERATORS,
    "stem": "light",
    "merge": "input",
    "pairs": "all",
    "skip_policy": "remove",
    "in_channels": 2,
    "n_classes": 2,
    "image_size_px": 224,
    "head_channels": 64,
}

PRESETS: dict[str, dict[str, Any]] = {
    "thesis": _BASE,
    "fasterseg": {
        **_BASE,
        "scales": (8, 16, 32),
        "widths": (4, 6, 8, 10, 12),
        "end_widths": (8, 12),
        "stem": "fasterseg",
        "image_size_px": 256,
        "head_channels": 128,
    },
    "small": {
        **_BASE,
        "n_layers": 6,
        "widths": (4, 8, 12),
        "end_widths": (8, 12),
        "image_size_px": 96,
        "head_channels": 24,
    },
    "tiny": {
        **_BASE,
        "n_layers": 4,
        "widths": (2, 4),
        "end_widths": (2, 4),
        "image_size_px": 32,
        "head_channels": 4,
    },
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "stem": ("light", "two", "fasterseg"),
    "merge": ("input", "output"),
    "skip_policy": ("remove", "conv"),
}


@dataclass(frozen=True)
class Cell:
    """Grid position: absolute downsampling rate and layer (1 … L)."""

    scale: int
    layer: int

    @property
    def name(self) -> str:
        """Return for example ``s4_l7``."""
        return f"s{self.scale}_l{self.layer}"


@dataclass(frozen=True)
class Layout:
    """Checked options of a space and everything that follows from them by counting; see `NASBraNet` for each option.

    Raises:
        ArchitectureError: An option is not allowed; the message says what is.
    """

    n_layers: int
    scales: tuple[int, ...]
    widths: tuple[int, ...]
    end_widths: tuple[int, ...]
    n_branches: int
    operators: tuple[str, ...]
    stem: str
    merge: str
    pairs: str | tuple[str, ...]
    skip_policy: str
    in_channels: int
    n_classes: int
    image_size_px: int
    head_channels: int

    def __post_init__(self) -> None:
        for name in ("scales", "widths", "end_widths", "operators"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        for name in ("n_layers", "n_branches", "in_channels", "image_size_px", "head_channels"):
            _require(_positive(getattr(self, name)), f"{name}={getattr(self, name)!r}: expected a whole number ≥ 1")
        _require(_positive(self.n_classes) and self.n_classes >= 2, f"n_classes={self.n_classes!r}: expected 2 or more")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, f"{name}={value!r}: {did_you_mean(str(value), allowed)}")
        self._check_scales()
        self._check_pairs()
        self._check_widths()
        _require(len(self.operators) > 0, "operators is empty: name at least one registered operator")
        for name in self.operators:
            _require(isinstance(name, str), f"operators={self.operators}: expected registered names, {name!r} is none")
        _require(
            len(set(self.operators)) == len(self.operators), f"operators repeat: {', '.join(map(str, self.operators))}"
        )

    def _check_scales(self) -> None:
        legal = bool(self.scales) and all(map(_positive, self.scales))
        legal = legal and all(fine * 2 == coarse for fine, coarse in pairwise(self.scales))
        _require(
            legal and self.scales[0] >= 2 and _power_of_two(self.scales[0]),
            f"scales={self.scales}: expected powers of two from 2 on, each twice the one before, for example (2, 4, 8)",
        )
        _require(
            self.n_layers > len(self.scales),
            f"n_layers={self.n_layers}: {len(self.scales)} scales need at least {len(self.scales) + 1} layers",
        )
        _require(
            self.n_branches <= len(self.scales),
            f"n_branches={self.n_branches}: expected at most {len(self.scales)}, the number of scales",
        )
        divisor = self.divisor
        below = self.image_size_px // divisor * divisor
        _require(
            self.image_size_px % divisor == 0,
            f"image_size_px={self.image_size_px} is not divisible by {divisor} (twice the largest scale); "
            f"allowed for example: {', '.join(str(size) for size in (below, below + divisor) if size > 0)}",
        )

    def _check_pairs(self) -> None:
        if self.pairs == "all":
            return
        allowed = list(self._all_branch_sets())
        given = tuple(self.pairs) if isinstance(self.pairs, list | tuple) else (self.pairs,)
        for name in given:
            _require(name in allowed, f"pairs={self.pairs!r}: expected all, or a list of {_listed(allowed)}")
        _require(bool(given) and len(set(given)) == len(given), f"pairs={self.pairs!r}: name each set of branches once")
        # In the space's own order, so that equal spaces have equal options.
        object.__setattr__(self, "pairs", tuple(name for name in allowed if name in given))

    def _check_widths(self) -> None:
        for name in ("widths", "end_widths"):
            value = getattr(self, name)
            legal = bool(value) and all(map(_positive, value)) and all(low < high for low, high in pairwise(value))
            _require(
                legal,
                f"{name}={value}: expected increasing whole numbers ≥ 1, for example (16, 24, 32)",
            )
        _require(len(self.end_widths) <= 2, f"end_widths={self.end_widths}: give one, or two for student and teacher")
        _require(
            set(self.end_widths) <= set(self.widths),
            f"end_widths={self.end_widths}: each must be one of widths={self.widths}",
        )

    @classmethod
    def from_options(cls, preset: str, **overrides: Any) -> Layout:
        """Expand a preset; an override of ``None`` counts as not given.

        Raises:
            ArchitectureError: Unknown preset or option, or a value that is not allowed.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ArchitectureError(f"unknown preset {preset!r}: {did_you_mean(str(preset), PRESETS)}")
        for name in overrides:
            if name not in _BASE:
                raise ArchitectureError(f"unknown option {name!r}: {did_you_mean(name, [*_BASE, 'preset'])}")
        return cls(**{**PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None}})

    def options(self) -> dict[str, Any]:
        """Return every option as plain JSON data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    # The grid ---------------------------------------------------------------------------------------------------------

    @property
    def divisor(self) -> int:
        """Number that divides the input's height and width: zoomed convolutions halve the coarsest scale once more."""
        return 2 * self.scales[-1] if self.scales else 1

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, layer by layer, finest first."""
        return tuple(
            Cell(scale, layer)
            for layer in range(1, self.n_layers + 1)
            for index, scale in enumerate(self.scales)
            if layer > index
        )

    def has_cell(self, cell: Cell) -> bool:
        """Tell whether the grid holds the cell."""
        return cell.scale in self.scales and self.scales.index(cell.scale) < cell.layer <= self.n_layers

    def has_down(self, cell: Cell) -> bool:
        """Tell whether the cell has a down output."""
        return cell.scale != self.scales[-1] and cell.layer < self.n_layers

    def inputs(self, cell: Cell) -> dict[int, Cell]:
        """Return the cell's possible inputs by their index (`FROM_FINER`, `FROM_SAME`); empty for the first cell."""
        finer = Cell(cell.scale // 2, cell.layer - 1)
        same = Cell(cell.scale, cell.layer - 1)
        found = {FROM_FINER: finer, FROM_SAME: same}
        return {index: source for index, source in found.items() if self.has_cell(source)}

    def has_input_choice(self, cell: Cell) -> bool:
        """Tell whether both inputs exist, so that the node has a β."""
        return len(self.inputs(cell)) == 2

    def successor(self, cell: Cell, stride: int) -> Cell | None:
        """Return the cell that takes the keep (stride 1) or down (stride 2) output; none after the last layer."""
        following = Cell(cell.scale * stride, cell.layer + 1)
        return following if self.has_cell(following) else None

    def size_px(self, scale: int) -> int:
        """Return the side of feature maps at ``scale`` for an input of `image_size_px`."""
        return self.image_size_px // scale

    # Choices ----------------------------------------------------------------------------------------------------------

    def width_label(self, cell: Cell | None) -> str | None:
        """Return the label of a node's width; ``None`` (after the last layer) and the first node have the end width.

        Returns:
            A label, or none where only one width is allowed.
        """
        if cell is None or cell.layer == 1:
            return ENDS_LABEL if len(self.end_widths) > 1 else None
        return f"width_{cell.name}" if len(self.widths) > 1 else None

    def width_values(self, cell: Cell | None) -> tuple[int, ...]:
        """Return the widths a node can have; see `width_label`."""
        return self.end_widths if cell is None or cell.layer == 1 else self.widths

    @cached_property
    def branch_sets(self) -> dict[str, tuple[int, ...]]:
        """Name → final scales, for every set of branches a head exists for."""
        sets = self._all_branch_sets()
        return sets if self.pairs == "all" else {name: sets[name] for name in self.pairs}

    def _all_branch_sets(self) -> dict[str, tuple[int, ...]]:
        return {"_".join(map(str, scales)): scales for scales in combinations(self.scales, self.n_branches)}

    @cached_property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Every label with its values, in the order of NNI's ``simplify()``; input choices take a list of one index."""
        found: dict[str, tuple[Any, ...]] = {}
        for cell in self.cells:
            if self.has_input_choice(cell):
                found[f"in_{cell.name}"] = (FROM_FINER, FROM_SAME)
            label = self.width_label(cell)
            if label is not None:
                found[label] = self.width_values(cell)
            found[f"op_{cell.name}"] = self.operators
        found[BRANCHES_LABEL] = tuple(self.branch_sets)
        return found

    def variable_groups(self) -> dict[str, list[str]]:
        """Return the labels with more than one value by kind: ``operator`` (α), ``scale`` (β), ``width`` (γ)."""
        groups: dict[str, list[str]] = {"operator": [], "scale": [], "width": []}
        kinds = {"op_": "operator", "in_": "scale", "width_s": "width"}
        for label, values in self.choices.items():
            for prefix, kind in kinds.items():
                if label.startswith(prefix) and len(values) > 1:
                    groups[kind].append(label)
        return groups

    @property
    def fixed_choices(self) -> dict[str, dict[str, int]]:
        """What the two architectures of a co-search never search: the student's and the teacher's end width."""
        if len(self.end_widths) == 1:
            return {"student": {}, "teacher": {}}
        return {"student": {ENDS_LABEL: self.end_widths[0]}, "teacher": {ENDS_LABEL: self.end_widths[1]}}

    def counts(self) -> dict[str, int]:
        """Count the space as METHOD §2 does.

        Returns:
            ``cells``; ``input_choices`` (nodes with a β); ``paths`` (of all branch sets); ``cell_choices``, the
            operator and output width of every cell before the last layer, where a skip has no width of its own:
            (1 + (|O|-1)·|X|)^n; and ``total``, their product.
        """
        per_scale = [math.comb(self.n_layers - 1, index) for index in range(len(self.scales))]
        paths = sum(
            math.prod(per_scale[self.scales.index(scale)] for scale in scales) for scales in self.branch_sets.values()
        )
        inner = sum(cell.layer < self.n_layers for cell in self.cells)
        cell_choices = (1 + (len(self.operators) - 1) * len(self.widths)) ** inner
        return {
            "cells": len(self.cells),
            "input_choices": sum(self.has_input_choice(cell) for cell in self.cells),
            "paths": paths,
            "cell_choices": cell_choices,
            "total": paths * cell_choices,
        }

    def check_sample(self, sample: Mapping[str, Any]) -> None:
        """Check that a sample names every choice of the space with an allowed value and nothing else.

        Raises:
            ArchitectureError: A choice is missing, unknown or has a value that is not allowed.
        """
        _require(isinstance(sample, Mapping), f"the sample is {sample!r}: expected a mapping of label to value")
        for label, values in self.choices.items():
            if label not in sample:
                raise ArchitectureError(f"the sample lacks the choice '{label}': allowed values are {_listed(values)}")
            value = sample[label]
            if label.startswith("in_"):
                legal = isinstance(value, list | tuple) and len(value) == 1 and value[0] in values
                _require(legal, f"choice '{label}' is {value!r}: allowed are [0] (from the finer scale) and [1] (same)")
            else:
                _require(value in values, f"choice '{label}' is {value!r}: allowed are {_listed(values)}")
        for label in sample:
            if label not in self.choices and label not in REFINEMENTS:
                known = [*self.choices, *REFINEMENTS]
                raise ArchitectureError(f"the sample has an unknown choice '{label}': {_nearest(str(label), known)}")
        names = {cell.name for cell in self.cells}
        kept, down = sample.get(KEPT_SKIPS, ()), sample.get(DOWN_OPERATORS, {})
        _require(isinstance(kept, list | tuple), f"{KEPT_SKIPS} is {kept!r}: expected a list of cells, such as s4_l3")
        _require(isinstance(down, Mapping), f"{DOWN_OPERATORS} is {down!r}: expected a mapping of cell to operator")
        for name in kept:
            is_cell = isinstance(name, str) and name in names
            _require(is_cell, f"{KEPT_SKIPS} names '{name}', which is no cell of the space, such as s4_l3")
        for name, operator in down.items():
            legal = isinstance(name, str) and name in names and operator in self.operators
            _require(
                legal, f"{DOWN_OPERATORS}: '{name}: {operator}' is not a cell with one of {_listed(self.operators)}"
            )


def _nearest(given: str, allowed: Sequence[str]) -> str:
    # A space has over a hundred labels: the suggestion helps, the whole list would not.
    sentence = did_you_mean(given, allowed)
    return sentence.split("Allowed:")[0] + f"Allowed are the {len(allowed)} labels of simplify()."


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ArchitectureError(f"{name}={value!r}: expected a list")
    return tuple(value)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArchitectureError(message)
