from __future__ import annotations

import json
from pathlib import Path

import nni
import numpy as np
import pandas as pd
import pytest
import torch
from nni.nas.evaluator import Evaluator
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import Random
from torch import nn

from glioma_nas.config import MarkerConfig, parse_config
from glioma_nas.errors import CohortError, ConfigError, ImageError, LabelError, LeakageError, StorageError
from glioma_nas.files import write_json
from glioma_nas.folds import make_folds
from glioma_nas.marker_evaluator import build_evaluator, load_evaluator
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy, cases_of_study
from glioma_nas.markers import cut_case
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.stages import classify
from glioma_nas.testing.classifier_suite import phantom_cases

SEQUENCES = ("t1ce", "flair")
SIDE = 32
N_PATIENTS = 16
N_FOLDS = 2


def write_preprocess(folder, *, ages=None, labels=None, present=None):
    """Write what the preprocess stage leaves: the tumours of IDH-mutant patients are brighter on T1c."""
    phantoms = phantom_cases(N_PATIENTS, side=SIDE, n_slices=4, signal=3.0)
    for index, phantom in enumerate(phantoms):
        # A slice above and below the tumour, so that slices have to be chosen.
        images = np.pad(phantom.images, ((1, 1), (0, 0), (0, 0), (0, 0)))
        mask = np.pad(phantom.mask, ((1, 1), (0, 0), (0, 0)))
        own = folder / "cases" / phantom.case_id
        own.mkdir(parents=True)
        np.save(own / "images.npy", images)
        np.save(own / "mask.npy", mask)
        words = {"idh": "mutant" if phantom.label else "wildtype", "ki67": str(5 + 20 * phantom.label)}
        write_json(
            own / "case.json",
            {
                "case_id": phantom.case_id,
                "patient_id": phantom.patient_id,
                "age": phantom.age if ages is None else ages[index],
                "sex": phantom.sex,
                "labels": words if labels is None else labels(index, words),
                "sequences": list(SEQUENCES),
                "present": list(SEQUENCES if present is None else present(index)),
                "mask": str(own / "mask.npy"),
                "mask_labels": [1],
                "n_slices": len(images),
                "tumour_px": [int(area) for area in mask.sum(axis=(1, 2))],
                "brain_px": [SIDE * SIDE] * len(images),
                "min_tumour_px": 1,
                "voxel_hashes": {"t1ce": f"hash{index}"},
                "native_sequence": "t1ce",
                "step_sequence": "t1ce",
                "scans": {
                    "t1ce": {
                        "path": "none.nii.gz",
                        "shape": [SIDE, SIDE, len(images)],
                        "affine": np.eye(4).tolist(),
                        "motion": np.eye(4).tolist(),
                    }
                },
                "grid": {"affine": np.eye(4).tolist(), "spacing_mm": [1.0, 1.0, 1.0], "steps": []},
                "training_slices": list(range(len(images))),
                "quality": {},
            },
        )
    index = {"sequences": list(SEQUENCES), "image_size_px": SIDE, "cases": [case.case_id for case in phantoms]}
    write_json(folder / "index.json", {**index, "excluded": []})
    make_folds(phantoms_as_rows(phantoms), n_folds=N_FOLDS, seed=0, stratify_by=("idh",)).write(folder / "folds.json")


class Row:
    def __init__(self, phantom):
        self.case_id, self.patient_id = phantom.case_id, phantom.patient_id
        self.labels = {"idh": str(phantom.label)}


def phantoms_as_rows(phantoms):
    return [Row(phantom) for phantom in phantoms]


def write_segment(folder, preprocess, *, empty=(), leak=()):
    cohort = PreparedCohort.load(preprocess)
    provenance = {}
    for case in cohort.cases.values():
        fold = cohort.folds.fold_of(case.case_id)
        path = folder / "masks_prepared" / "student" / f"{case.case_id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.array(case.mask())
        np.save(path, mask * 0 if case.case_id in empty else mask)
        train = [cohort.cases[case_id].patient_id for case_id in cohort.folds.train(fold)]
        train += [case.patient_id] if case.case_id in leak else []
        provenance[case.case_id] = {"network": "student", "fold": fold, "train_patients": train}
    write_json(folder / "masks_prepared" / "student" / "provenance.json", provenance)


def context(root, *, markers=None, missing="error", **changes):
    config = parse_config(
        {
            "cohort": {"sheet": "cohort.csv", "sequences": list(SEQUENCES), "missing_sequence": missing},
            "folds": {"n_folds": N_FOLDS},
            "classify": {
                "epochs": 10,
                "slices_per_case": 3,
                "image_size_px": SIDE,
                "bootstrap_samples": 100,
                "permutation_samples": 100,
                "grad_cam_cases": 0,
                "markers": markers or {"idh": {"column": "idh", "positive": "mutant", "options": {"metadata": False}}},
                **changes,
            },
        },
        source="test",
        folder=root,
    )
    folder = root / "classify"
    folder.mkdir(exist_ok=True)
    return StageContext(config, folder, {"preprocess": root / "preprocess", "segment": root / "segment"}, Silent())


@pytest.fixture
def run_folder(tmp_path):
    write_preprocess(tmp_path / "preprocess")
    write_segment(tmp_path / "segment", tmp_path / "preprocess")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_preprocess(root / "preprocess")
    write_segment(root / "segment", root / "preprocess", empty=("case004",))
    return root, classify.run(context(root, grad_cam_cases=2))


def test_classify_finds_the_planted_marker_and_says_how_surely(finished):
    _, results = finished
    summary = results["markers"]["idh"]
    assert summary["metrics"]["auc"]["value"] > 0.85
    assert (summary["n_patients"], summary["n_positive"]) == (N_PATIENTS, N_PATIENTS // 2)
    assert summary["positive_class"] == "idh = mutant"
    assert summary["statement"].startswith(f"out-of-fold AUC {summary['metrics']['auc']['value']:.3f} (95 % interval")
    json.dumps(results, allow_nan=False)


def test_classify_writes_metrics_with_n_split_and_interval(finished):
    root, _ = finished
    for name in ("metrics.json", "baseline_age_sex_metrics.json"):
        metrics = json.loads((root / "classify" / "idh" / name).read_text())
        assert {"auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "kappa", "mcc", "brier"} <= set(
            metrics
        )
        for figure in metrics.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert (figure["n"], figure["n_positive"]) == (N_PATIENTS, N_PATIENTS // 2)
            assert figure["split"] == "out-of-fold, patient level, 2 folds"
        low, high = sorted((metrics["sensitivity"]["value"], metrics["specificity"]["value"]))
        assert low <= metrics["accuracy"]["value"] <= high


def test_classify_predicts_every_case_in_the_fold_that_holds_it_out(finished):
    root, _ = finished
    folds = PreparedCohort.load(root / "preprocess").folds
    for name in ("predictions.csv", "baseline_age_sex_predictions.csv"):
        frame = pd.read_csv(root / "classify" / "idh" / name)
        assert sorted(frame["case_id"]) == sorted(f"case{index:03d}" for index in range(N_PATIENTS))
        assert all(folds.fold_of(row.case_id) == row.fold for row in frame.itertuples())
        assert (frame["predicted"] == (frame["probability"] >= frame["threshold"])).all()


def test_classify_writes_a_roc_curve_whose_area_is_the_auc(finished):
    root, results = finished
    curves = pd.read_csv(root / "classify" / "idh" / "roc.csv")
    own = curves[curves["classifier"] == "idh"]
    area = np.trapezoid(own["true_positive_rate"], own["false_positive_rate"])
    assert area == pytest.approx(results["markers"]["idh"]["metrics"]["auc"]["value"], abs=1e-4)
    assert set(curves["classifier"]) == {"idh", "age_sex", "tumour_volume", "radiomics"}


def test_classify_says_which_cases_had_an_empty_mask_and_unknown_age(finished):
    _, results = finished
    summary = results["markers"]["idh"]
    assert summary["middle_slices_because_mask_empty"] == ["case004"]
    phantoms = phantom_cases(N_PATIENTS, side=SIDE, n_slices=4, signal=3.0)
    assert summary["n_age_unknown"] == sum(phantom.age is None for phantom in phantoms) > 0
    assert summary["n_sex_unknown"] == sum(phantom.sex is None for phantom in phantoms) > 0


def test_classify_leaves_classifiers_that_predict_a_new_patient(finished):
    root, _ = finished
    case = next(iter(PreparedCohort.load(root / "preprocess").cases.values()))
    evaluator = load_evaluator(root / "classify" / "idh" / "idh")
    inputs = cut_case(
        case,
        case.mask(),
        order=SEQUENCES,
        sequences=evaluator.settings.sequences,
        slices_per_case=evaluator.settings.slices_per_case,
        image_size_px=evaluator.settings.image_size_px,
    )
    probability = evaluator.predict_folds(root / "classify" / "idh" / "idh", [inputs])
    assert probability.shape == (1,) and 0 < probability[0] < 1


def test_classify_repeats_and_reads_finished_folds_back(finished):
    root, results = finished
    weights = sorted((root / "classify").rglob("weights.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert len(weights) == N_FOLDS
    assert classify.run(context(root, grad_cam_cases=2)) == results
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_classify_serves_several_markers_and_counts_unknown_labels(tmp_path):
    write_preprocess(
        tmp_path / "preprocess", labels=lambda index, words: words if index != 5 else {**words, "ki67": "unknown"}
    )
    write_segment(tmp_path / "segment", tmp_path / "preprocess")
    markers = {
        "idh": {"column": "idh", "positive": "mutant", "classifier": "age_sex"},
        "ki67": {"column": "ki67", "threshold": 10, "classifier": "kinet"},
    }
    summaries = classify.run(context(tmp_path, markers=markers, epochs=1))["markers"]
    assert (summaries["idh"]["n_patients"], summaries["idh"]["n_left_out_label_unknown"]) == (N_PATIENTS, 0)
    assert summaries["idh"]["auc_minus_baseline"] is None
    assert (tmp_path / "classify" / "idh" / "baseline_age_sex_metrics.json").is_file()
    assert (summaries["ki67"]["n_patients"], summaries["ki67"]["n_left_out_label_unknown"]) == (N_PATIENTS - 1, 1)
    assert summaries["ki67"]["positive_class"] == "ki67 ≥ 10"


@pytest.mark.parametrize(("missing", "n_patients"), [("exclude", N_PATIENTS - 1), ("zero", N_PATIENTS)])
def test_classify_treats_missing_sequences_as_the_cohort_says(tmp_path, missing, n_patients):
    write_preprocess(tmp_path / "preprocess", present=lambda index: ("flair",) if index == 2 else SEQUENCES)
    write_segment(tmp_path / "segment", tmp_path / "preprocess")
    summary = classify.run(context(tmp_path, missing=missing, epochs=1))["markers"]["idh"]
    assert summary["n_patients"] == n_patients
    key = "left_out_sequence_missing" if missing == "exclude" else "zero_channel_for_missing_sequence"
    assert summary[key] == {"case002": "t1ce"}


def test_classify_is_refused_when_a_sequence_is_missing_and_that_is_an_error(tmp_path):
    write_preprocess(tmp_path / "preprocess", present=lambda index: ("flair",) if index == 2 else SEQUENCES)
    write_segment(tmp_path / "segment", tmp_path / "preprocess")
    with pytest.raises(CohortError, match="case case002 lacks sequence 't1ce' of marker 'idh'"):
        classify.run(context(tmp_path))


def test_classify_compares_with_every_baseline_and_says_when_it_beats_none(finished):
    _, results = finished
    summary = results["markers"]["idh"]
    assert set(summary["baselines"]) == {"age_sex", "tumour_volume", "radiomics"}
    for name, gap in summary["auc_minus_baselines"].items():
        words = {"age_sex": "age and sex", "tumour_volume": "tumour volume", "radiomics": "radiomics"}[name]
        verb = "beats" if gap["beats"] else "does not beat"
        assert f"The model {verb} {words}" in summary["statement"]
        assert gap["beats"] == (gap["difference"] > 0 and gap["p_holm"] < 0.05)
    # The phantoms' signal is plain brightness: hand-made features find it as well, so nothing is beaten there.
    assert summary["auc_minus_baselines"]["radiomics"]["beats"] is False
    assert summary["permutation_p"]["idh"] < 0.05


def test_classify_writes_reliability_subgroups_and_abstention(finished):
    root, results = finished
    reliability = pd.read_csv(root / "classify" / "idh" / "reliability.csv")
    assert reliability.groupby("classifier")["n"].sum().eq(N_PATIENTS).all()
    subgroups = pd.read_csv(root / "classify" / "idh" / "subgroups.csv")
    assert subgroups.groupby("column")["n"].sum().to_dict() == {"age": N_PATIENTS, "sex": N_PATIENTS}
    assert results["markers"]["idh"]["subgroup_columns_not_in_sheet"] == ["grade", "site"]
    abstention = pd.read_csv(root / "classify" / "idh" / "abstention.csv")
    assert abstention["n_called"].is_monotonic_decreasing
    assert abstention["n_called"].iloc[0] == N_PATIENTS


def test_classify_draws_grad_cam_as_png_and_nifti_and_checks_it(finished):
    import nibabel as nib

    root, results = finished
    maps = results["markers"]["idh"]["grad_cam"]
    assert len(maps) == 2
    for row in maps:
        folder = root / "classify" / "idh" / "grad_cam"
        assert (folder / row["png"]).read_bytes().startswith(b"\x89PNG")
        volume = nib.load(folder / row["nifti"]).get_fdata()
        assert volume.shape == (SIDE, SIDE, 6)
        assert volume.min() >= 0 and 0 < volume.max() <= 1
        assert row["similarity_with_randomised_weights"] is None or row["similarity_with_randomised_weights"] < 0.95


def test_report_shows_baselines_reliability_subgroups_and_grad_cam(finished):
    from types import SimpleNamespace

    from glioma_nas.report import marker_section
    from glioma_nas.report.page import Page, render
    from glioma_nas.report.records import _read_marker

    root, _ = finished
    records = SimpleNamespace(markers={"idh": _read_marker(root / "classify", "idh")})
    section = marker_section.build(records, context(root).config)
    tables = {block.name: block for block in section.blocks if block.kind == "table"}
    assert {"marker_idh", "baselines_idh", "subgroups_idh"} <= set(tables)
    assert len(tables["baselines_idh"].rows) == 3
    figures = {item.figure.name for block in section.blocks if block.kind == "figures" for item in block.pictures}
    assert "reliability_idh" in figures
    assert len([name for name in figures if name.startswith("grad_cam_idh_")]) == 2
    html = render(Page("t", "s", (), "Research use only", (), [section]))
    assert "Similarity with randomised weights" in html and "not beaten" in html
    (root / "page.html").write_text(html)


def test_classify_integrates_markers_into_a_subtype(tmp_path):
    write_preprocess(
        tmp_path / "preprocess",
        labels=lambda index, words: {
            **words,
            "codel": "codeleted" if index % 4 == 1 else "intact",
            "cdkn2a": "deleted" if index == 3 else "",
        },
    )
    write_segment(tmp_path / "segment", tmp_path / "preprocess")
    markers = {
        "idh": {"column": "idh", "positive": "mutant", "classifier": "radiomics"},
        "codel": {"column": "codel", "positive": "codeleted", "classifier": "radiomics"},
    }
    subtype = {
        "predicted": {"idh": "idh", "codel_1p19q": "codel"},
        "measured": {"cdkn2a": {"column": "cdkn2a", "altered": "deleted", "wildtype": "retained"}},
        "tau": 0.4,
    }
    results = classify.run(context(tmp_path, markers=markers, subtype=subtype))["subtype"]
    table = pd.read_csv(tmp_path / "classify" / "subtype.csv").set_index("patient_id")
    assert len(table) == results["n_patients"] == N_PATIENTS
    assert results["n_called"] == table["call"].notna().sum() > 0
    assert sum(row["n"] for row in results["outcomes"]) == N_PATIENTS
    assert sum(row["n"] for row in results["outcomes"] if row["call"] != "none") == results["n_called"]
    agree = sum(row["n_agree_with_known_markers"] or 0 for row in results["outcomes"])
    assert agree == results["n_agree_with_known_markers"]
    assert sum(results["next_tests"].values()) == table["next_test"].notna().sum()
    assert table.loc["patient001", "from_known_markers"] == "oligodendroglioma, IDH-mutant and 1p/19q-codeleted"
    assert table.loc["patient003", "from_known_markers"] == "astrocytoma, IDH-mutant"
    assert table.loc["patient000", "from_known_markers"] == "diffuse glioma, IDH-wildtype, NOS"
    assert "not a WHO integrated diagnosis" in results["disclaimer"]


def test_classify_takes_masks_of_experts_without_any_network(run_folder):
    (run_folder / "segment" / "masks_prepared" / "student" / "provenance.json").unlink()
    summary = classify.run(context(run_folder, masks="expert", markers=AGE_ONLY))["markers"]["idh"]
    assert summary["masks"] == "drawn by experts, from the sheet"


AGE_ONLY = {"idh": {"column": "idh", "positive": "mutant", "classifier": "age_sex"}}


@pytest.mark.parametrize(
    ("provenance", "error", "message"),
    [
        (None, ConfigError, "set classify.mask_provenance"),
        ({}, LeakageError, "case case000: it is not recorded which patients"),
        ({"train_patients": ["patient000"]}, LeakageError, "case case000: its mask was made by network 'nnunet'"),
    ],
)
def test_classify_refuses_given_masks_that_are_not_shown_to_be_out_of_fold(run_folder, provenance, error, message):
    changes = {"masks": "given", "markers": AGE_ONLY}
    if provenance is not None:
        record = {f"case{index:03d}": {"network": "nnunet", **provenance} for index in range(N_PATIENTS)}
        write_json(run_folder / "provenance.json", record if provenance else {})
        changes["mask_provenance"] = "provenance.json"
    with pytest.raises(error, match=message):
        classify.run(context(run_folder, **changes))
    assert trained_nothing(run_folder)


@pytest.mark.parametrize("content", [[{"case_id": "case000"}], {"case000": ["patient001"]}])
def test_classify_refuses_provenance_of_another_form(run_folder, content):
    write_json(run_folder / "provenance.json", content)
    with pytest.raises(ConfigError, match=r"provenance\.json: not an object of case id"):
        classify.run(context(run_folder, masks="given", mask_provenance="provenance.json", markers=AGE_ONLY))


def test_classify_takes_given_masks_with_provenance(run_folder):
    record = {f"case{index:03d}": {"network": "nnunet", "train_patients": ["else"]} for index in range(N_PATIENTS)}
    write_json(run_folder / "provenance.json", record)
    given = context(run_folder, masks="given", mask_provenance="provenance.json", markers=AGE_ONLY)
    assert classify.run(given)["markers"]["idh"]["n_patients"] == N_PATIENTS


def test_classify_refuses_masks_of_a_network_that_is_not_there(run_folder):
    with pytest.raises(ConfigError, match="unknown network 'studnt': did you mean 'student'"):
        classify.run(context(run_folder, masks="studnt"))


def test_classify_refuses_a_mask_on_another_grid(run_folder):
    path = run_folder / "segment" / "masks_prepared" / "student" / "case003.npy"
    np.save(path, np.zeros((6, SIDE, SIDE + 1), dtype=np.uint8))
    with pytest.raises(ImageError, match="case case003: the mask has shape"):
        classify.run(context(run_folder))


def trained_nothing(root):
    return not list((root / "classify").rglob("*"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"column": "mgmt", "positive": "methylated"}, r"cohort\.csv: marker 'bad', column 'mgmt': the sheet lacks"),
        ({"column": "ki67", "threshold": 100}, "all 16 patients with a known value are of one class"),
        ({"column": "idh", "threshold": 1}, "unknown value 'wildtype' in case case000"),
    ],
)
def test_classify_is_refused_before_any_training_when_labels_cannot_be_used(run_folder, bad, message):
    markers = {"idh": {"column": "idh", "positive": "mutant"}, "bad": bad}
    with pytest.raises(LabelError, match=message):
        classify.run(context(run_folder, markers=markers))
    assert trained_nothing(run_folder)


def test_classify_is_refused_before_any_training_when_an_option_is_unknown(run_folder):
    markers = {
        "idh": {"column": "idh", "positive": "mutant"},
        "bad": {"column": "idh", "positive": "mutant", "options": {"mod": "IMG"}},
    }
    with pytest.raises(ConfigError, match="classifier 'idh' has no option 'mod': did you mean 'mode'"):
        classify.run(context(run_folder, markers=markers))
    assert trained_nothing(run_folder)


@pytest.mark.parametrize(
    ("subtype", "error", "message"),
    [
        ({"predicted": {"idhh": "idh"}}, ConfigError, "unknown marker 'idhh'"),
        ({"predicted": {"idh": "ihd"}}, ConfigError, "no marker 'ihd': did you mean 'idh'"),
        (
            {"measured": {"cdkn2a": {"column": "cdkn2", "altered": "deleted", "wildtype": "retained"}}},
            LabelError,
            r"measured\.cdkn2a: the sheet lacks column 'cdkn2'",
        ),
        (
            {"measured": {"cdkn2a": {"column": "idh", "altered": "deleted", "wildtype": "wildtype"}}},
            LabelError,
            "column 'idh' holds 'mutant'; allowed are 'deleted'",
        ),
    ],
)
def test_classify_is_refused_before_any_training_when_a_subtype_cannot_be_made(run_folder, subtype, error, message):
    changes = {"markers": AGE_ONLY, "subtype": {"predicted": {"idh": "idh"}, **subtype}}
    with pytest.raises(error, match=message):
        classify.run(context(run_folder, **changes))
    assert trained_nothing(run_folder)


def test_classify_is_refused_when_a_mask_is_not_out_of_fold(tmp_path):
    write_preprocess(tmp_path / "preprocess")
    write_segment(tmp_path / "segment", tmp_path / "preprocess", leak=("case007",))
    with pytest.raises(LeakageError, match=r"case case007: its mask was made by network 'student'"):
        classify.run(context(tmp_path))
    assert trained_nothing(tmp_path)


def test_classify_is_refused_when_a_mask_is_missing(run_folder):
    (run_folder / "segment" / "masks_prepared" / "student" / "case003.npy").unlink()
    with pytest.raises(StorageError, match=r"case003\.npy: predicted mask missing .* run the segment stage again"):
        classify.run(context(run_folder))


def test_classify_does_nothing_when_no_marker_is_configured(run_folder):
    config = parse_config({"cohort": {"sheet": "cohort.csv"}}, source="test", folder=run_folder)
    bare = StageContext(
        config,
        run_folder / "classify",
        {"preprocess": run_folder / "preprocess", "segment": run_folder / "segment"},
        Silent(),
    )
    assert classify.run(bare) == {"markers": {}}


class Threshold(nn.Module):
    """A segmentation network that calls bright FLAIR tumour, smoothed against the noise."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, x):
        smooth = nn.functional.avg_pool2d(x[:, :1], 5, stride=1, padding=2)
        return torch.cat([torch.zeros_like(smooth), smooth - self.level], dim=1)


class ThresholdSpace(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.net = LayerChoice([Threshold(0.5), Threshold(0.6)], label="net")

    def forward(self, x):
        return self.net(x)


def study(root, **changes):
    arguments = {
        "preprocess_folder": root / "preprocess",
        "marker": "idh",
        "config": MarkerConfig(column="idh", positive="mutant"),
        "sheet": Path("cohort.csv"),
        "network_sequences": ("flair",),
        "network_patients": (),
        **changes,
    }
    return MarkerStudy(**arguments)


SETTINGS = ClassifierSettings(sequences=SEQUENCES, epochs=6, batch_size=16, slices_per_case=3, image_size_px=SIDE)


def test_evaluator_scores_a_segmentation_network_by_the_auc_of_its_masks(run_folder):
    evaluator = build_evaluator("idh", SETTINGS, {"mode": "ROI", "metadata": False}, study=study(run_folder))
    model = Threshold(0.5).train()
    value = evaluator.evaluate(model)
    assert 0.5 < value <= 1.0
    assert evaluator.evaluate(model) == value
    assert model.training


def test_evaluator_reports_to_nni_inside_a_trial_only(run_folder):
    evaluator = nni.load(nni.dump(build_evaluator("age_sex", SETTINGS, {}, study=study(run_folder))))
    frozen = RawFormatModelSpace.from_model(ThresholdSpace(), evaluator).freeze({"net": 1})
    with Evaluator.mock_runtime(frozen):
        value = evaluator.evaluate(frozen.executable_model())
    assert frozen.metrics.final == value
    assert evaluator.evaluate(Threshold(0.5)) == pytest.approx(value)


def test_evaluator_refuses_patients_the_network_was_trained_on(run_folder):
    leaky = study(run_folder, network_patients=("patient003",), case_ids=("case002", "case003"))
    with pytest.raises(LeakageError, match="case case003: the segmentation network was trained on its patient"):
        build_evaluator("idh", SETTINGS, {}, study=leaky).evaluate(Threshold(0.5))


@pytest.mark.parametrize(("missing", "n"), [("zero", N_PATIENTS), ("exclude", N_PATIENTS - 1)])
def test_study_treats_missing_sequences_as_it_is_told(tmp_path, missing, n):
    write_preprocess(tmp_path / "preprocess", present=lambda index: SEQUENCES if index != 3 else ("flair",))
    cases, _ = cases_of_study(Threshold(0.5), study(tmp_path, missing_sequence=missing), SETTINGS)
    assert len(cases) == n
    assert all(case.images[:, 0].any() for case in cases if case.case_id != "case003")
    with pytest.raises(CohortError, match="case case003 lacks sequence 't1ce'"):
        cases_of_study(Threshold(0.5), study(tmp_path), SETTINGS)


def test_study_is_not_built_without_saying_whom_the_network_saw(tmp_path):
    arguments = vars(study(tmp_path)).copy()
    del arguments["network_patients"]
    with pytest.raises(TypeError, match="network_patients"):
        MarkerStudy(**arguments)


def test_evaluator_works_with_a_built_in_nni_strategy(run_folder):
    evaluator = build_evaluator("age_sex", SETTINGS, {}, study=study(run_folder))
    space = RawFormatModelSpace.from_model(ThresholdSpace(), evaluator)
    strategy = Random(seed=0)
    before = nni.trial._params
    try:
        strategy(space, SequentialExecutionEngine(max_model_count=2))
    finally:
        # NNI leaves the last trial's parameters behind, and other tests look at them.
        nni.trial._params = before
    models = list(strategy.list_models())
    assert len(models) == 2
    assert all(0 < model.metrics.final <= 1 for model in models)
