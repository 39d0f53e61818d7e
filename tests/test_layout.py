from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.layout import PRESETS, Cell, Layout
from glioma_nas.search_spaces.nasbranet import NASBraNet


def first_sample(layout: Layout) -> dict[str, Any]:
    return {label: [values[0]] if label.startswith("in_") else values[0] for label, values in layout.choices.items()}


def test_counts_of_the_thesis_preset_are_those_of_the_thesis() -> None:
    layout = Layout.from_options("thesis")
    counts = layout.counts()
    assert counts["cells"] == 16 + 15 + 14
    assert counts["input_choices"] == 14 + 13
    assert counts["paths"] == 15 + 105 + 15 * 105 == 1695
    assert counts["cell_choices"] == 21**42
    assert counts["total"] == 1695 * 21**42
    assert f"{counts['total']:.1e}" == "5.8e+58"


def test_paths_equal_brute_force_enumeration() -> None:
    layout = Layout.from_options("tiny", n_layers=6)

    def paths_to(cell: Cell) -> int:
        sources = layout.inputs(cell)
        return sum(paths_to(source) for source in sources.values()) if sources else 1

    to_final = {scale: paths_to(Cell(scale, 6)) for scale in layout.scales}
    expected = to_final[2] * to_final[4] + to_final[2] * to_final[8] + to_final[4] * to_final[8]
    assert layout.counts()["paths"] == expected


def test_thesis_layout_has_the_cells_and_ends_of_the_method() -> None:
    layout = Layout.from_options("thesis")
    assert not layout.has_cell(Cell(8, 2))
    assert layout.has_cell(Cell(8, 3))
    assert layout.inputs(Cell(4, 2)) == {0: Cell(2, 1)}
    assert layout.inputs(Cell(4, 3)) == {0: Cell(2, 2), 1: Cell(4, 2)}
    assert layout.inputs(Cell(2, 1)) == {}
    assert not layout.has_down(Cell(8, 5))
    assert not layout.has_down(Cell(2, 16))
    assert layout.fixed_choices == {"student": {"width_ends": 32}, "teacher": {"width_ends": 48}}
    assert list(layout.branch_sets) == ["2_4", "2_8", "4_8"]


def test_variable_groups_hold_each_searchable_label_once() -> None:
    groups = Layout.from_options("thesis").variable_groups()
    assert len(groups["operator"]) == 45
    assert len(groups["scale"]) == 27
    assert len(groups["width"]) == 44
    assert "width_ends" not in groups["width"]
    assert Layout.from_options("thesis", widths=(32,), end_widths=(32,)).variable_groups()["width"] == []


def test_labels_have_no_slash() -> None:
    assert not any("/" in label for label in Layout.from_options("thesis").choices)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_options_are_plain_json_and_build_the_same_layout(preset: str) -> None:
    layout = Layout.from_options(preset)
    options = json.loads(json.dumps(layout.options()))
    assert Layout.from_options("thesis", **options) == layout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size_px": 100}, r"image_size_px=100 is not divisible by 16 .*96, 112"),
        ({"widths": (16, 16, 32)}, "expected increasing whole numbers"),
        ({"widths": (32, 16)}, "expected increasing whole numbers"),
        ({"widths": ("a", 24)}, "expected increasing whole numbers"),
        ({"widths": (None, 16)}, "expected increasing whole numbers"),
        ({"scales": (None, 4)}, "powers of two"),
        ({"n_branches": 4}, "n_branches=4: expected at most 3"),
        ({"scales": (2, 8)}, "each twice the one before"),
        ({"scales": (3, 6)}, "powers of two"),
        ({"end_widths": (20,)}, "each must be one of widths"),
        ({"end_widths": (16, 24, 32)}, "give one, or two"),
        ({"n_layers": 3}, "need at least 4 layers"),
        ({"n_layers": 0}, "whole number ≥ 1"),
        ({"n_classes": 1}, "expected 2 or more"),
        ({"stem": "lite"}, "did you mean 'light'"),
        ({"merge": "sum"}, "merge='sum': .*Allowed: input, output"),
        ({"operators": ()}, "operators is empty"),
        ({"operators": ("skip", "skip")}, "operators repeat"),
        ({"operators": "skip"}, "expected a list"),
        ({"operators": ("skip", None)}, "expected registered names, None is none"),
        ({"pairs": ["2_4", "2_16"]}, "expected all, or a list of 2_4, 2_8, 4_8"),
        ({"pairs": []}, "name each set of branches once"),
        ({"pairs": "some"}, "expected all, or a list of 2_4"),
        ({"skip_policy": "drop"}, "Allowed: conv, remove"),
        ({"n_layer": 8}, "did you mean 'n_layers'"),
    ],
)
def test_from_options_refuses_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        Layout.from_options("thesis", **options)


def test_from_options_refuses_an_unknown_preset() -> None:
    with pytest.raises(ArchitectureError, match="did you mean 'thesis'"):
        Layout.from_options("tesis")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op_s2_l1": None}, "lacks the choice 'op_s2_l1': allowed values are skip, conv3x3"),
        ({"op_s2_l1": "conv5x5"}, "'op_s2_l1' is 'conv5x5': allowed are skip"),
        ({"width_s2_l2": 3}, "'width_s2_l2' is 3: allowed are 2, 4"),
        ({"in_s4_l3": 0}, r"'in_s4_l3' is 0: allowed are \[0\]"),
        ({"in_s4_l3": [2]}, r"'in_s4_l3' is \[2\]"),
        ({"branches": "4_2"}, "allowed are 2_4, 2_8, 4_8"),
        ({"op_s2_l9": "skip"}, "unknown choice 'op_s2_l9': did you mean"),
        ({"kept_skips": ["s16_l1"]}, "no cell of the space"),
        ({"kept_skips": [["s2_l1"]]}, "no cell of the space"),
        ({"kept_skips": "s2_l1"}, "kept_skips is 's2_l1': expected a list of cells"),
        ({"down_operators": ["s2_l1"]}, "expected a mapping of cell to operator"),
        ({"down_operators": {"s2_l1": "conv5x5"}}, "is not a cell with one of"),
    ],
)
def test_check_sample_refuses_what_the_space_does_not_hold(change: dict[str, Any], message: str) -> None:
    layout = Layout.from_options("tiny")
    sample = {label: value for label, value in (first_sample(layout) | change).items() if value is not None}
    with pytest.raises(ArchitectureError, match=message):
        layout.check_sample(sample)


def test_check_sample_accepts_every_first_value() -> None:
    layout = Layout.from_options("tiny")
    layout.check_sample(first_sample(layout))


def test_check_sample_refuses_what_is_no_mapping() -> None:
    with pytest.raises(ArchitectureError, match="the sample is None: expected a mapping of label to value"):
        NASBraNet("tiny").freeze(None)  # type: ignore[arg-type]  # what a caller may do all the same


def test_pairs_name_the_sets_of_branches_that_heads_exist_for() -> None:
    layout = Layout.from_options("thesis", pairs=["4_8", "2_4"])
    assert layout.choices["branches"] == ("2_4", "4_8")
    assert layout.counts()["paths"] == 15 + 15 * 105
    assert Layout.from_options("thesis", **json.loads(json.dumps(layout.options()))) == layout
    space = NASBraNet("tiny", pairs=["2_8"])
    assert list(space.heads.names) == ["2_8"]
    sample = first_sample(space.layout)
    with pytest.raises(ArchitectureError, match="choice 'branches' is '2_4': allowed are 2_8"):
        space.freeze(sample | {"branches": "2_4"})
    assert space.freeze(sample).eval()(torch.zeros(1, 2, 32, 32)).shape == (1, 2, 32, 32)
