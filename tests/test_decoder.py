from __future__ import annotations

from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest

from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.decoder import decode
from glioma_nas.search_spaces.drawing import describe
from glioma_nas.search_spaces.layout import Cell, Layout
from glioma_nas.search_spaces.path_decoder import best_paths
from glioma_nas.search_spaces.plan import make_plan

SKIPS = frozenset({"skip"})
Weights = dict[str, Any]


def random_weights(layout: Layout, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {label: rng.dirichlet(np.ones(len(values))) for label, values in layout.choices.items()}


def favouring(layout: Layout, wishes: dict[str, Any], *, second: dict[str, Any] | None = None) -> Weights:
    """Return weights that put most on a wished value, less on the second wish and little on the rest."""
    weights = {}
    for label, values in layout.choices.items():
        array = np.full(len(values), 0.05)
        if label in wishes:
            array[values.index(wishes[label])] = 1.0
        if second and label in second:
            array[values.index(second[label])] = 0.4
        weights[label] = array / array.sum()
    return weights


def all_paths(layout: Layout, scale: int) -> list[list[Cell]]:
    """Enumerate every legal path by its downsampling positions."""
    found = []
    for targets in combinations(range(2, layout.n_layers + 1), layout.scales.index(scale)):
        layers = range(1, layout.n_layers + 1)
        found.append([Cell(layout.scales[sum(t <= layer for t in targets)], layer) for layer in layers])
    return found


def score(layout: Layout, weights: Weights, path: list[Cell], method: str) -> float:
    total = 1.0
    for source, cell in pairwise(path):
        down = source.scale < cell.scale
        if method != "viterbi" and down and not layout.has_input_choice(cell):
            return 0.0  # no β, so no candidate
        if layout.has_input_choice(cell) and (down or method == "viterbi"):
            total *= weights[f"in_{cell.name}"][0 if down else 1]
    return total


def consistent(paths: tuple[list[Cell], ...]) -> bool:
    sources: dict[Cell, Cell] = {}
    return all(sources.setdefault(cell, source) == source for path in paths for source, cell in pairwise(path))


def within_ranges(layout: Layout, path: list[Cell]) -> bool:
    """Tell whether FasterSeg's code considers a path: three cells before and between downsamplings, two at the end."""
    targets = [cell.layer for before, cell in pairwise(path) if cell.scale > before.scale]
    wide_enough = all(later - earlier >= 3 for earlier, later in pairwise(targets))
    return not targets or (targets[0] >= 4 and targets[-1] < layout.n_layers and wide_enough)


@pytest.mark.parametrize("method", ["joint", "viterbi", "fasterseg"])
@pytest.mark.parametrize("finals", [(4,), (8,), (2, 4), (2, 8), (4, 8), (2, 4, 8)])
def test_best_paths_equal_brute_force(finals: tuple[int, ...], method: str) -> None:
    layout = Layout.from_options("tiny", n_layers=9 if method == "fasterseg" else 7, n_branches=len(finals))
    choices = [all_paths(layout, scale) for scale in finals]
    if method == "fasterseg":
        choices = [[path for path in paths if within_ranges(layout, path)] for paths in choices]
    for seed in range(15):
        weights = random_weights(layout, seed)
        legal = [paths for paths in product(*choices) if consistent(paths)]
        best = max(np.prod([score(layout, weights, path, method) for path in paths]) for paths in legal)
        found = best_paths(layout, weights, finals, method=method)
        assert consistent(tuple(found.values()))
        assert {scale: path[-1].scale for scale, path in found.items()} == {scale: scale for scale in finals}
        assert np.prod([score(layout, weights, path, method) for path in found.values()]) == pytest.approx(best)


def test_best_paths_survive_zero_probabilities() -> None:
    layout = Layout.from_options("tiny", n_layers=6)
    weights = {label: np.array([0.0, 1.0]) for label in layout.variable_groups()["scale"]}
    weights["in_s4_l5"] = np.array([1.0, 0.0])
    paths = best_paths(layout, weights, (2, 4), method="viterbi")
    assert [cell.scale for cell in paths[4]] == [2, 2, 2, 2, 4, 4]


def test_joint_chooses_among_nodes_with_two_inputs_only() -> None:
    # Node (4, 2) can only come from the finer scale; counted as probability 1 it would beat every learned position.
    layout = Layout.from_options("tiny", n_layers=6)
    weights = {label: np.array([0.3, 0.7]) for label in layout.variable_groups()["scale"]}
    weights["in_s4_l4"] = np.array([0.6, 0.4])
    assert [cell.scale for cell in best_paths(layout, weights, (4,), method="joint")[4]] == [2, 2, 2, 4, 4, 4]


def test_viterbi_counts_a_node_with_one_input_as_certain() -> None:
    layout = Layout.from_options("tiny", n_layers=6)
    weights = {label: np.array([0.1, 0.9]) for label in layout.variable_groups()["scale"]}
    assert [cell.scale for cell in best_paths(layout, weights, (8,), method="viterbi")[8]] == [2, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("method", ["joint", "viterbi", "fasterseg"])
def test_decode_is_legal_and_deterministic_for_random_weights(method: str) -> None:
    layout = Layout.from_options("thesis")
    for seed in range(6):
        weights = random_weights(layout, seed)
        for branches, architecture in product(layout.branch_sets, ("student", "teacher")):
            arguments = {"skips": SKIPS, "architecture": architecture, "branches": branches, "method": method}
            sample = decode(layout, weights, **arguments)
            layout.check_sample(sample)
            assert sample == decode(layout, weights, **arguments)
            plan = make_plan(layout, sample, SKIPS)
            assert tuple(plan.outputs) == layout.branch_sets[branches]


def test_decoded_input_choices_walk_back_to_the_decoded_positions() -> None:
    layout = Layout.from_options("thesis")
    for seed in range(6):
        weights = random_weights(layout, seed)
        paths = best_paths(layout, weights, (4, 8))
        plan = make_plan(layout, decode(layout, weights, skips=SKIPS, branches="4_8"), SKIPS)
        assert {scale: list(path) for scale, path in plan.paths.items()} == paths


def test_decode_takes_the_most_probable_operator_width_and_branches() -> None:
    layout = Layout.from_options("tiny")
    weights = random_weights(layout, 0)
    sample = decode(layout, weights, skips=SKIPS)
    for label, values in layout.choices.items():
        if label.startswith(("op_", "width_s", "branches")):
            assert sample[label] == values[int(np.argmax(weights[label]))]
    assert sample["width_ends"] == 2


def test_teacher_is_widest_and_has_no_skip() -> None:
    layout = Layout.from_options("tiny")
    weights = favouring(layout, dict.fromkeys(layout.variable_groups()["operator"], "skip"))
    for label in layout.variable_groups()["width"]:
        del weights[label]
    sample = decode(layout, weights, skips=SKIPS, architecture="teacher", branches="2_4")
    assert all(value == 4 for label, value in sample.items() if label.startswith("width"))
    assert "skip" not in sample.values()


def test_least_confident_skips_stay() -> None:
    layout = Layout.from_options("tiny", n_layers=9, n_branches=1)
    weights = favouring(layout, dict.fromkeys(layout.variable_groups()["operator"], "skip"))
    for layer in (5, 6, 9):
        weights[f"op_s2_l{layer}"] = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    sample = decode(layout, weights, skips=SKIPS, branches="2")
    plan = make_plan(layout, sample, SKIPS)
    assert [step.cell.layer for step in plan.steps] == [5, 6, 9]
    assert sample["kept_skips"] == ["s2_l5", "s2_l6", "s2_l9"]


def test_sample_has_no_refinement_where_none_is_needed() -> None:
    layout = Layout.from_options("thesis")
    weights = favouring(layout, dict.fromkeys(layout.variable_groups()["operator"], "conv3x3"))
    assert set(decode(layout, weights, skips=SKIPS, branches="2_4")) == set(layout.choices)


TABLE_4_3 = [
    ("conv3x3_x2", 2, 16, 32),
    ("conv3x3_x2", 2, 16, 32),
    ("zoomed_conv_x2", 2, 16, 32),
    ("zoomed_conv_x2", 2, 16, 32),
    ("conv3x3_x2", 2, 16, 32),
    ("conv3x3_x2", 2, 16, 32),
    ("zoomed_conv_x2", 4, 16, 64),
    ("zoomed_conv_x2", 4, 48, 192),
    ("zoomed_conv_x2", 4, 32, 128),
]
TABLE_4_4 = [
    ("conv3x3_x2", 2, 16, 32),
    ("conv3x3_x2", 2, 16, 32),
    ("zoomed_conv_x2", 2, 16, 32),
    ("zoomed_conv", 2, 32, 64),
    ("zoomed_conv_x2", 4, 16, 64),
    ("zoomed_conv_x2", 4, 16, 64),
    ("zoomed_conv_x2", 4, 16, 64),
    ("zoomed_conv_x2", 4, 16, 64),
    ("zoomed_conv_x2", 8, 16, 128),
    ("zoomed_conv_x2", 8, 32, 256),
]


def thesis_weights(layout: Layout) -> Weights:
    """Return weights that favour the cells of tables 4-3 and 4-4.

    Cell (2, 4) prefers the skip, and the zoomed convolution next: the branch that stays leaves the skip out, the other
    goes down through the next best operator. Nothing else explains a fourth cell that differs between the branches.
    """
    wishes: dict[str, Any] = dict.fromkeys(layout.variable_groups()["operator"], "skip")
    fine = dict(zip((1, 2, 3, 5, 6, 12), TABLE_4_3[:6], strict=True))
    cells = {(2, layer): row for layer, row in fine.items()}
    cells |= {(4, layer): row for layer, row in zip((13, 14, 16), TABLE_4_3[6:], strict=True)}
    cells |= {(4, layer): row for layer, row in zip((5, 6, 7, 8), TABLE_4_4[4:8], strict=True)}
    cells |= {(8, layer): row for layer, row in zip((9, 16), TABLE_4_4[8:], strict=True)}
    for (scale, layer), (operator, *_) in cells.items():
        wishes[f"op_s{scale}_l{layer}"] = operator
    wishes |= dict.fromkeys(layout.variable_groups()["width"], 16)
    # The width of a cell's output is that of the node behind it.
    wishes |= {"width_s4_l5": 32, "width_s4_l15": 48}
    weights = favouring(layout, wishes, second={"op_s2_l4": "zoomed_conv"})
    for label in layout.variable_groups()["scale"]:
        down = {"in_s4_l13": 0.97, "in_s4_l5": 0.9, "in_s8_l9": 0.9}.get(label, 0.05)
        weights[label] = np.array([down, 1 - down])
    return weights


@pytest.mark.parametrize("method", ["joint", "viterbi", "fasterseg"])
def test_tables_4_3_and_4_4_are_decoded_row_by_row(method: str) -> None:
    layout = Layout.from_options("thesis")
    sample = decode(layout, thesis_weights(layout), skips=SKIPS, branches="4_8", method=method, down_skips="next_best")
    rows = describe(make_plan(layout, sample, SKIPS))
    # The tables print χ·s for a downsampling cell too, whose real output is χ·2s.
    found = {
        final: [(r["operator"], r["scale"], r["width"], r["width"] * r["scale"]) for r in rows if r["branch"] == final]
        for final in (4, 8)
    }
    assert found == {4: TABLE_4_3, 8: TABLE_4_4}
    assert [r["cell"] for r in rows if r["shared"] and r["branch"] == 4] == [1, 2, 3]
    assert [r["out_channels"] for r in rows if r["stride"] == 2] == [16 * 4, 32 * 4, 16 * 8]


def test_down_skips_keep_leaves_the_strided_skip() -> None:
    layout = Layout.from_options("thesis")
    sample = decode(layout, thesis_weights(layout), skips=SKIPS, branches="4_8", method="viterbi")
    assert sample["op_s2_l4"] == "skip"
    assert "down_operators" not in sample


def test_fasterseg_keeps_to_its_ranges() -> None:
    layout = Layout.from_options("thesis")
    for seed in range(5):
        paths = best_paths(layout, random_weights(layout, seed), (4, 8), method="fasterseg")
        cells = {scale: [sum(cell.scale == s for cell in path) for s in (2, 4, 8)] for scale, path in paths.items()}
        assert cells[4][0] >= 3
        assert cells[4][1] >= 2
        assert cells[8][0] >= 3
        assert cells[8][1] >= 3
        assert cells[8][2] >= 2


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"op_s2_l1": None}, {}, "the weights lack 'op_s2_l1'; expected probabilities of skip"),
        ({"op_s2_l1": [0.5, 0.5]}, {}, r"shape \(2,\); expected \(5,\)"),
        ({"in_s4_l3": [0.5, 0.9]}, {}, "probabilities that sum to 1"),
        ({"in_s4_l3": [float("nan"), 1.0]}, {}, "probabilities that sum to 1"),
        ({}, {"method": "greedy"}, "decode method 'greedy': .*Allowed: fasterseg, joint, viterbi"),
        ({}, {"method": "fasterseg", "branches": "2_8"}, "needs more than 4 layers"),
        ({}, {"branches": "2_16"}, "branches '2_16'.*Allowed: 2_4, 2_8, 4_8"),
        ({}, {"architecture": "giant"}, "Allowed: student, teacher"),
        ({}, {"down_skips": "drop"}, "Allowed: keep, next_best"),
    ],
)
def test_decode_refuses_what_it_cannot_read(change: Weights, arguments: dict[str, Any], message: str) -> None:
    layout = Layout.from_options("tiny")
    weights = {label: value for label, value in (random_weights(layout, 0) | change).items() if value is not None}
    with pytest.raises(ArchitectureError, match=message):
        decode(layout, weights, skips=SKIPS, **arguments)
