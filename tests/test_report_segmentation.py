"""The report's chapter on segmentation: Dice with its interval, overlays, failures, and the pictures."""

from __future__ import annotations

import base64
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_run import HOSTILE_ID, read

from glioma_nas.errors import StorageError
from glioma_nas.report.charts import NetworkPoint, colour_of, tradeoff_chart
from glioma_nas.report.figures import Drawing, chart, drawing_figure
from glioma_nas.report.intervals import PatientEstimate
from glioma_nas.report.label_placement import NamedPoint, place_names
from glioma_nas.report.overlays import choose_slice, window
from glioma_nas.report.segmentation_section import rank_name, spread


@pytest.mark.slow
def test_report_states_dice_with_n_split_and_interval(
    finished_report: tuple[Path, dict[str, Any]], report_html: str
) -> None:
    # Dice of the student: 0.94, 0.89, … 0.39; mean 0.665, median 0.665; fold 0 holds the even ones: mean 0.69.
    rows = {row["network"]: row for row in read(finished_report[0] / "tables" / "segmentation.csv")}
    student = rows["student"]
    assert float(student["dice_mean"]) == pytest.approx(0.665)
    assert float(student["dice_search_fold"]) == pytest.approx(0.69)
    assert float(student["dice_low"]) < 0.665 < float(student["dice_high"])
    assert (student["n_patients"], student["split"], student["n_hd95"]) == ("12", "out-of-fold", "11")
    assert float(student["hd95_median_mm"]) == pytest.approx(9.0)
    assert "0.665" in report_html
    assert "0.690 (6)" in report_html
    paired = {row["comparison"]: row for row in read(finished_report[0] / "tables" / "segmentation-paired.csv")}
    assert float(paired["student − u_net"]["difference"]) == pytest.approx(0.01)
    assert float(paired["student − teacher"]["difference"]) == pytest.approx(-0.01)
    failures = read(finished_report[0] / "tables" / "failures.csv")
    assert [row["case_id"] for row in failures] == [HOSTILE_ID, "case_10", "case_09"]


def test_drawing_figure_gives_the_page_colours_to_a_drawing() -> None:
    figure = drawing_figure("x", '<svg viewBox="0 0 320.5 40"><text>a</text></svg>', "a drawing")
    svg = base64.b64decode(figure.uri.split(",")[1]).decode()
    assert svg.startswith('<svg viewBox="0 0 320.5 40"><style>svg{color:#')
    assert figure.width_px == 320


def test_drawing_figure_refuses_what_is_no_drawing() -> None:
    with pytest.raises(StorageError, match="'x' is no SVG element with a viewBox"):
        drawing_figure("x", "<svg><rect/></svg>", "no viewBox")


def test_choose_slice_takes_the_largest_expert_mask_and_else_the_predicted_one() -> None:
    truth = np.zeros((4, 3, 3), np.uint8)
    predicted = np.zeros((4, 3, 3), np.uint8)
    assert choose_slice(truth, predicted) == 2
    predicted[3, 0, 0] = 1
    assert choose_slice(truth, predicted) == 3
    truth[1, :2, :2] = 1
    assert choose_slice(truth, predicted) == 1


def test_window_keeps_background_black_and_fills_the_range() -> None:
    image = np.zeros((10, 10), np.float32)
    image[2:8, 2:8] = np.linspace(-2, 2, 36, dtype=np.float32).reshape(6, 6)
    shown = window(image)
    assert shown.min() == 0
    assert shown.max() == 1
    assert not shown[image == 0].any()


def test_spread_holds_best_median_and_worst() -> None:
    assert spread(55, 3) == [0, 27, 54]
    assert [rank_name(rank, 55) for rank in spread(55, 3)] == ["best", "median", "worst"]
    assert spread(1, 6) == [0]
    assert rank_name(0, 1) == "best"


def boxes_of(drawing: Drawing, names: set[str]) -> dict[str, Any]:
    renderer = drawing.canvas.canvas.get_renderer()
    return {
        text.get_text(): text.get_window_extent(renderer) for text in drawing.axes.texts if text.get_text() in names
    }


def crowded(generator: np.random.Generator) -> list[NamedPoint]:
    """Eight networks, five of them close together, as in a real comparison."""
    points = []
    for number in range(8):
        x = float(generator.uniform(4, 6) if number < 5 else generator.uniform(1, 12))
        y = float(generator.uniform(0.79, 0.83))
        points.append(NamedPoint(f"network number {number}", x, y, y - 0.05, y + 0.05, "#20262e"))
    return points


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_names_of_a_front_cover_neither_each_other_nor_a_point(seed: int) -> None:
    points = crowded(np.random.default_rng(seed))
    with chart("names", "names of networks", width_in=7.4, height_in=4.2) as drawing:
        for point in points:
            drawing.axes.errorbar(point.x, point.y, yerr=0.05, fmt="o")
        drawing.axes.margins(x=0.22, y=0.12)
        place_names(drawing, points)
        boxes = boxes_of(drawing, {point.name for point in points})
        at = drawing.axes.transData.transform([(point.x, point.y) for point in points])
    assert set(boxes) == {point.name for point in points}
    for first, second in combinations(boxes.values(), 2):
        assert not first.overlaps(second)
    for box in boxes.values():
        assert not any(box.contains(x, y) for x, y in at)


def test_name_stands_right_above_its_point_where_there_is_room() -> None:
    with chart("names", "one name") as drawing:
        drawing.axes.set_xlim(0, 10)
        drawing.axes.set_ylim(0, 1)
        place_names(drawing, [NamedPoint("student", 2, 0.5, 0.4, 0.6, "#20262e")])
        box = boxes_of(drawing, {"student"})["student"]
        x, y = drawing.axes.transData.transform((2, 0.5))
    assert 0 < box.x0 - x < 20 and 0 < box.y0 - y < 20


@pytest.mark.slow
def test_front_is_drawn_through_what_no_other_network_beats() -> None:
    points = [
        NetworkPoint(name, PatientEstimate(dice, dice - 0.05, dice + 0.05, 20), latency_ms)
        for name, dice, latency_ms in (("student", 0.77, 3.0), ("teacher", 0.83, 10.0), ("slow", 0.80, 200.0))
    ]
    figure = tradeoff_chart(points, colour_of([point.network for point in points]))
    svg = base64.b64decode(figure.uri.split(",")[1]).decode()
    # One step from student to teacher, none to the network that the teacher beats; 3 to 200 ms need a logarithm.
    steps = [path for path in re.findall(r'<path d="([^"]+)" clip-path', svg) if path.count("L") == 2]
    assert len(steps) == 1
    assert figure.alt == "student: Dice 0.770 at 3.0 ms; teacher: Dice 0.830 at 10.0 ms; slow: Dice 0.800 at 200.0 ms"
