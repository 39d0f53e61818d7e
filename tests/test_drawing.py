from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread as read_png
from rich.console import Console
from supernets import random_sample
from typer.testing import CliRunner

from glioma_nas.architecture import Architecture
from glioma_nas.cli import app
from glioma_nas.errors import GliomaNasError
from glioma_nas.search_spaces.drawing import SHARED_COLOUR, edge_colours
from glioma_nas.search_spaces.layout import PRESETS
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.search_spaces.plan import NetworkPlan

SVG = "{http://www.w3.org/2000/svg}"


def test_describe_lists_each_branch_from_the_stem() -> None:
    space = NASBraNet("tiny", n_branches=1, skip_policy="conv")
    sample = random_sample(space, 0) | {"branches": "4", "in_s4_l3": [0], "in_s4_l4": [1], "width_s2_l2": 4}
    sample |= {"op_s2_l1": "zoomed_conv", "op_s2_l2": "conv3x3", "width_s4_l3": 2, "width_ends": 4}
    rows = space.describe(sample)
    assert [(row["cell"], row["layer"], row["scale"], row["stride"]) for row in rows] == [
        (1, 1, 2, 1),
        (2, 2, 2, 2),
        (3, 3, 4, 1),
        (4, 4, 4, 1),
    ]
    assert (rows[0]["operator"], rows[0]["width"], rows[0]["out_channels"]) == ("zoomed_conv", 4, 8)
    assert (rows[1]["operator"], rows[1]["width"], rows[1]["out_channels"]) == ("conv3x3", 2, 8)
    assert rows[3]["out_channels"] == 4 * 4
    assert not any(row["shared"] for row in rows)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_drawing_is_well_formed_and_self_contained(preset: str) -> None:
    space = NASBraNet(preset)
    svg = space.draw(random_sample(space, 1))
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert svg.count("http") == 1  # the namespace
    assert "<script" not in svg
    assert "<image" not in svg


def test_drawing_names_the_operator_and_width_of_every_cell_used() -> None:
    space = NASBraNet("tiny", skip_policy="conv")
    sample = random_sample(space, 1)
    texts = " ".join(element.text or "" for element in ElementTree.fromstring(space.draw(sample)).iter(f"{SVG}text"))
    for row in space.describe(sample):
        assert f"χ {row['width']} · {row['out_channels']} ch" in texts
        assert row["operator"].split("_")[0] in texts
    assert "stem light" in texts
    assert "head" in texts


def test_drawing_has_one_box_for_each_cell_used_and_a_mark_for_the_others() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 1)
    root = ElementTree.fromstring(space.draw(sample))
    used = {(row["scale"], row["layer"]) for row in space.describe(sample)}
    boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill-opacity") == "0.3"]
    marks = [circle for circle in root.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]
    assert len(boxes) == len(used)
    assert len(marks) == 9 - len(used)


@pytest.mark.parametrize("seed", range(8))
def test_only_what_branches_compute_together_is_drawn_as_shared(seed: int) -> None:
    space = NASBraNet("tiny", n_layers=6)
    sample = random_sample(space, seed) | {"branches": "2_4"}
    plan = space.plan(sample)
    shared_cells = {step.cell for step in plan.steps if len(step.branches) > 1}
    boxes = [box for box in ElementTree.fromstring(space.draw(sample)).iter(f"{SVG}rect") if box.get("rx") == "8"]
    assert sum(box.get("fill") == SHARED_COLOUR for box in boxes) == len(shared_cells)
    colours = dict.fromkeys(plan.outputs, "own")
    for (start, end), colour in edge_colours(space.layout, plan, colours).items():
        together = [final for final in plan.outputs if _passes(space, plan, final, start, end)]
        carried = {_last_step(plan, final, start[1]) for final in together}
        assert (colour == SHARED_COLOUR) == (len(together) > 1 and len(carried) == 1)


def _passes(space: NASBraNet, plan: NetworkPlan, final: int, start: tuple[int, int], end: tuple[int, int]) -> bool:
    places = {0: space.layout.scales[0], space.layout.n_layers + 1: final}
    places |= {cell.layer: cell.scale for cell in plan.paths[final]}
    return places[start[1]] == start[0] and places[end[1]] == end[0]


def _last_step(plan: NetworkPlan, final: int, layer: int) -> int:
    """Return the step whose output the branch carries on behind a layer; -1: the stem's."""
    return max((i for i in plan.branch_steps(final) if plan.steps[i].cell.layer <= layer), default=-1)


def test_two_drawings_on_one_page_have_different_ids() -> None:
    space = NASBraNet("tiny")
    ids = [
        {
            marker.get("id")
            for marker in ElementTree.fromstring(space.draw(random_sample(space, seed))).iter(f"{SVG}marker")
        }
        for seed in (0, 1)
    ]
    assert ids[0] and ids[0].isdisjoint(ids[1])


@pytest.mark.parametrize("preset", ["tiny", "thesis"])
def test_png_is_a_picture_of_the_network(preset: str) -> None:
    space = NASBraNet(preset)
    png = space.draw_png(random_sample(space, 1), dpi=50)
    assert png.startswith(b"\x89PNG")
    pixels = read_png(io.BytesIO(png))
    assert pixels.shape[1] > pixels.shape[0]
    # Saturated colours are the branches; a drawing without any would show no network.
    colourful = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) > 0.3
    assert 0.001 < colourful.mean() < 0.5
    assert png == space.draw_png(random_sample(space, 1), dpi=50)
    assert png != space.draw_png(random_sample(space, 2), dpi=50)


def test_tree_names_every_cell_once_and_ends_each_branch_in_the_head() -> None:
    space = NASBraNet("thesis")
    for seed in range(3):
        sample = random_sample(space, seed)
        console = Console(width=120, file=io.StringIO(), record=True)
        console.print(space.tree(sample))
        lines = console.export_text().splitlines()
        plan = space.plan(sample)
        assert sum("layer" in line for line in lines) == len(plan.steps)
        assert sum("shared by" in line for line in lines) == sum(len(step.branches) > 1 for step in plan.steps)
        for scale in plan.outputs:
            assert sum(f"head takes branch 1/{scale}" in line for line in lines) == 1
        for row in space.describe(sample):
            text = f"{row['operator']}  χ {row['width']} · {row['out_channels']} ch"
            assert any(f"layer {row['layer']:>2}  1/{row['scale']}" in line and text in line for line in lines)


def test_architecture_is_shown_drawn_and_counted(tmp_path: Path) -> None:
    record = Path(__file__).resolve().parent.parent / "benchmarks" / "table_4_3_and_4_4.json"
    pictures = ["--svg", str(tmp_path / "network.svg"), "--png", str(tmp_path / "network.png")]
    result = CliRunner().invoke(app, ["architecture", str(record), *pictures], standalone_mode=False)
    assert result.exception is None
    space = NASBraNet("thesis")
    plan = space.plan(Architecture.load(record))
    assert sum("layer" in line for line in result.stdout.splitlines()) == len(plan.steps)
    figures = space.figures(Architecture.load(record))
    assert f"{figures.macs_g:.4g}" in result.stdout
    assert ElementTree.parse(tmp_path / "network.svg").getroot().tag == f"{SVG}svg"
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(CliRunner().invoke(app, ["architecture", str(record), "--json"], standalone_mode=False).stdout)
    assert rows[1] == {"figure": "parameters, 10⁶", "value": round(figures.params_m, 4)}


def test_record_that_is_none_is_refused_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    result = CliRunner().invoke(app, ["architecture", str(tmp_path / "record.json")], standalone_mode=False)
    assert isinstance(result.exception, GliomaNasError)
