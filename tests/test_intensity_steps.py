"""N4, percentile and Nyúl against values known by construction, and landmarks that must not come from test patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glioma_nas.case_preparation import Recipe, build_steps
from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.cohort import read_cohort
from glioma_nas.config import CohortConfig, PreprocessConfig, RunConfig, parse_config
from glioma_nas.errors import ConfigError, ImageError, LeakageError, StorageError, UnknownNameError
from glioma_nas.files import write_json
from glioma_nas.intensity_landmarks import learn_landmarks
from glioma_nas.pipeline import Pipeline, results_of
from glioma_nas.preprocess_steps.nyul import PERCENTILES, mean_landmarks
from glioma_nas.progress import Silent
from glioma_nas.registry import preprocess_steps
from glioma_nas.testing.phantoms import write_phantom_cohort

STEPS = ("orient", "nyul", "crop_pad", "resize")


def case(data: np.ndarray) -> CaseVolumes:
    return CaseVolumes({"t1": data.astype(np.float32)}, None, np.diag([2.0, 2.0, 4.0, 1.0]))


@pytest.mark.slow
def test_n4_removes_a_smooth_field_and_keeps_the_tissues() -> None:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in (64, 64, 24)), indexing="ij")
    ball = x**2 + y**2 + z**2 < 0.8
    tissue = np.where((np.sin(9 * x) * np.sin(8 * y) * np.cos(7 * z)) > 0, 1.0, 0.6)
    noise = np.random.default_rng(0).normal(0, 0.02, ball.shape)
    data = np.where(ball, (tissue + noise) * np.exp(0.4 * x - 0.3 * y) * 500, 0)
    found, record = preprocess_steps.get("n4")().apply(case(data), PreprocessConfig())
    corrected = found.images["t1"]
    assert not corrected[~ball].any()

    def spread(volume: np.ndarray) -> float:
        white = volume[ball & (tissue == 1)]
        return float(white.std() / white.mean())

    assert spread(data) > 0.18
    assert spread(corrected) < 0.4 * spread(data)
    # exp(0.4x - 0.3y) over the ball has a logarithm of deviation 0.2.
    assert record["t1"]["field_deviation"] == pytest.approx(0.2, abs=0.07)
    again, _ = preprocess_steps.get("n4")().apply(case(data), PreprocessConfig())
    np.testing.assert_array_equal(again.images["t1"], corrected)


def test_percentile_maps_its_ends_to_minus_one_and_one() -> None:
    data = np.zeros((11, 10, 10))
    data[1:] = np.arange(1, 1001).reshape(10, 10, 10)
    found, record = preprocess_steps.get("percentile")(low=0, high=50).apply(case(data), PreprocessConfig())
    image = found.images["t1"]
    assert record["t1"] == {"low": 1.0, "high": 500.5}
    assert (image[0] == 0).all()
    assert image[1, 0, 0] == -1
    assert image.max() == 1
    assert image[10, 9, 9] == 1
    assert image[1:].all(), "a voxel of the brain that lands on 0 would count as background"
    assert image[3, 5, 0] == pytest.approx((251 - 1) / 499.5 * 2 - 1, abs=1e-4)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        ("percentile", {"low": 50, "high": 10}, "low is 50, high is 10; expected 0 ≤ low < high ≤ 100"),
        ("n4", {"coarse_mm": 0}, "both must be positive"),
        ("resample", {"spacing_mm": -1}, "expected above 0"),
    ],
)
def test_options_out_of_range_are_refused(step: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess_steps.get(step)(**options)


def test_unknown_options_and_steps_are_refused_with_a_suggestion() -> None:
    config = PreprocessConfig(steps=("n4", "zscore"), step_options={"n4": {"coarse": 4}})
    with pytest.raises(ConfigError, match="unknown option 'coarse': did you mean 'coarse_mm'"):
        build_steps(config)
    with pytest.raises(UnknownNameError, match="did you mean 'strip_deepbet'"):
        build_steps(PreprocessConfig(steps=("strip_deepbt",)))
    with pytest.raises(ValueError, match="step_options names 'n4', which is not one of the steps"):
        PreprocessConfig(step_options={"n4": {}})


def test_flat_scan_has_no_percentiles() -> None:
    with pytest.raises(ImageError, match=r"'t1': percentiles 1 and 99 of its 27 non-zero voxels are both 5"):
        preprocess_steps.get("percentile")().apply(case(np.full((3, 3, 3), 5)), PreprocessConfig())


def landmarks_file(path: Path, standard: list[float], hashes: list[str] | None = None) -> Path:
    write_json(path, {"percentiles": list(PERCENTILES), "sequences": {"t1": standard}, "voxel_hashes": hashes or []})
    return path


def test_nyul_makes_a_gain_an_offset_and_a_gamma_disappear(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scan = generator.gamma(4, 50, (20, 20, 20)) + 10
    scan[:5] = 0
    own = np.percentile(scan[scan > 0], PERCENTILES)
    path = landmarks_file(tmp_path / "marks.json", mean_landmarks([own]))
    step = preprocess_steps.get("nyul")(landmarks=str(path))
    other = np.where(scan > 0, 3 * (scan / 100) ** 1.3 + 20, 0)
    first, second = (step.apply(case(data), PreprocessConfig())[0].images["t1"] for data in (scan, other))
    inner = (scan > own[0]) & (scan < own[-1])
    np.testing.assert_allclose(first[inner], second[inner], atol=0.03)
    assert not first[:5].any()
    # The outer percentiles stand at 0 and 100 of the standard scale, which is -2 and 2 here.
    assert np.percentile(first[first != 0], [1, 99]) == pytest.approx([-2, 2], abs=0.01)


def test_mean_landmarks_average_scaled_percentiles() -> None:
    assert mean_landmarks([np.array([0.0, 1, 4]), np.array([10.0, 16, 18])]) == [0, 50, 100]


def config_for(sheet: Path, marks: Path, **options: bool) -> RunConfig:
    preprocess = {
        "steps": list(STEPS),
        "step_options": {"nyul": {"landmarks": str(marks), **options}},
        "crop_size_px": 48,
        "image_size_px": 32,
        "workers": 1,
    }
    data = {"cohort": {"sheet": str(sheet)}, "preprocess": preprocess, "folds": {"n_folds": 2, "stratify_by": []}}
    return parse_config(data, source="test", folder=sheet.parent)


def test_landmarks_of_another_cohort_are_used_and_those_of_the_own_refused(tmp_path: Path) -> None:
    marks = {}
    for name, seed in (("other", 1), ("own", 0)):
        sheet = write_phantom_cohort(tmp_path / name, 4, seed)
        recipe = Recipe(("t1ce", "flair"), PreprocessConfig(steps=STEPS), (1,))
        learned = learn_landmarks(read_cohort(CohortConfig(sheet=sheet)).cases, recipe)
        assert learned["n_scans"] == {"t1ce": 4, "flair": 4}
        marks[name] = tmp_path / f"{name}.json"
        write_json(marks[name], learned)
    sheet = tmp_path / "own" / "cohort.csv"
    Pipeline(config_for(sheet, marks["other"]), tmp_path / "good", Silent()).run(["preprocess"])
    assert results_of(tmp_path / "good" / "preprocess")["notes"] == []
    with pytest.raises(LeakageError, match="learned from 8 scans of this cohort, so test patients took part"):
        Pipeline(config_for(sheet, marks["own"]), tmp_path / "bad", Silent()).run(["preprocess"])
    Pipeline(config_for(sheet, marks["own"], allow_own_patients=True), tmp_path / "bad", Silent()).run(["preprocess"])
    (note,) = results_of(tmp_path / "bad" / "preprocess")["notes"]
    assert "learned from 8 scans of this cohort" in note


def test_nyul_without_landmarks_is_refused_before_the_first_case(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 4, 0)
    with pytest.raises(StorageError, match=r"gone\.json: no such file"):
        Pipeline(config_for(sheet, tmp_path / "gone.json"), tmp_path / "run", Silent()).run(["preprocess"])
    write_json(tmp_path / "unhashed.json", {"sequences": {}, "percentiles": list(PERCENTILES)})
    with pytest.raises(StorageError, match="holds no intensity landmarks"):
        Pipeline(config_for(sheet, tmp_path / "unhashed.json"), tmp_path / "run", Silent()).run(["preprocess"])
    write_json(tmp_path / "odd.json", {"sequences": {}})
    with pytest.raises(StorageError, match="holds no intensity landmarks; learn them from other patients"):
        Pipeline(config_for(sheet, tmp_path / "odd.json"), tmp_path / "run", Silent()).run(["preprocess"])
    with pytest.raises(ConfigError, match=r"'nyul' needs preprocess.step_options.nyul.landmarks"):
        preprocess_steps.get("nyul")().check()


def test_resampled_brain_neither_grows_nor_darkens_at_its_rim() -> None:
    places = np.indices((60, 60, 20)).reshape(3, -1).T * [1.6, 1.6, 5.0]
    brain = (np.linalg.norm(places - [47, 47, 48], axis=1) < 38).reshape(60, 60, 20)
    image = (700 * brain).astype(np.float32)
    case = CaseVolumes({"t1": image}, None, np.diag([1.6, 1.6, 5.0, 1.0]))
    found, _ = preprocess_steps.get("resample")().apply(case, PreprocessConfig())
    np.testing.assert_allclose(np.unique(found.images["t1"]), [0, 700], rtol=1e-5)
    volume = brain.sum() * 1.6 * 1.6
    assert (found.images["t1"] != 0).sum() == pytest.approx(volume, rel=0.01)


@pytest.mark.parametrize(("slice_mm", "shape"), [(None, (40, 80, 10)), (2.0, (40, 80, 20))])
def test_resample_reaches_the_voxel_size_and_returns(slice_mm: float | None, shape: tuple[int, int, int]) -> None:
    x = np.linspace(-1, 1, 20)[:, None, None] * np.ones((20, 40, 10))
    mask = np.zeros(x.shape, np.uint8)
    mask[5:9, 10:20, 3:6] = 1
    start = CaseVolumes({"t1": x.astype(np.float32) + 3}, mask, np.diag([2.0, 2.0, 4.0, 1.0]))
    step = preprocess_steps.get("resample")(slice_mm=slice_mm)
    found, record = step.apply(start, PreprocessConfig())
    assert found.shape == shape
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), [1, 1, slice_mm or 4])
    # The corner of the field of view stays where it was.
    np.testing.assert_allclose(found.affine @ [-0.5, -0.5, -0.5, 1], start.affine @ [-0.5, -0.5, -0.5, 1])
    assert found.mask is not None
    assert found.mask.sum() == mask.sum() * np.prod(shape) / mask.size
    back = preprocess_steps.get("resample")().revert(found.mask.astype(np.float32), record)
    np.testing.assert_array_equal(back >= 0.5, mask > 0)
