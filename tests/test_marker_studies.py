from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from glioma_nas.config import parse_config
from glioma_nas.errors import ConfigError, LeakageError, StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import build_evaluator
from glioma_nas.marker_studies.page import weights_figure, write_page
from glioma_nas.marker_studies.runner import run_study
from glioma_nas.marker_studies.tables import TABLES, StudyRow, StudyTable
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.plugins.central_net import CentralNet
from glioma_nas.progress import Silent
from glioma_nas.roc_analysis import auc
from glioma_nas.testing.classifier_suite import ClassifierSuite
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ClassifierSettings(sequences=("t1ce", "flair"), epochs=1, batch_size=8, image_size_px=32)
FAST = StudyTable(
    "table-x",
    "A fast table",
    "idh",
    (
        StudyRow("Hand-made", "radiomics", {}, {"accuracy": 0.9, "sensitivity": 0.8, "specificity": 0.7, "auc": 0.85}),
        StudyRow("Size", "tumour_volume", {}),
    ),
)
# These classifiers have no preset.
object.__setattr__(FAST.rows[0], "full_options", lambda preset: {})
object.__setattr__(FAST.rows[1], "full_options", lambda preset: {})


class TestCentralNetClassifier(ClassifierSuite):
    classifier = "central_net"


def test_central_net_adds_weighted_maps_before_each_stage():
    network = CentralNet("small").eval()
    image, mask, metadata = torch.randn(2, 2, 64, 64), torch.ones(2, 1, 64, 64), torch.zeros(2, 2)
    entered = []
    network.stages["central"].layer1.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    with torch.no_grad():
        network.fusion[0] = torch.tensor([0.2, 0.5, 0.3])
        network(image, mask, metadata)
        t1c, t2f = torch.cat([image[:, :1], mask], 1), torch.cat([image[:, 1:], mask], 1)
        expected = (
            0.2 * network.stems["t1c"](t1c)
            + 0.5 * network.stems["central"](torch.cat([t1c, t2f], 1))
            + 0.3 * network.stems["t2f"](t2f)
        )
    assert torch.allclose(entered[0], expected, atol=1e-6)


def test_central_net_starts_uniform_and_learns_its_weights():
    network = CentralNet("small")
    assert torch.allclose(network.fusion, torch.full((4, 3), 1 / 3))
    outputs = network(torch.randn(4, 2, 64, 64), torch.ones(4, 1, 64, 64), torch.zeros(4, 2))
    assert set(outputs) == {"t1c", "t2f", "final"}
    network.loss(outputs, torch.tensor([0.0, 1.0, 0.0, 1.0])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert (network.fusion.grad != 0).any()


def test_central_net_branches_see_their_own_sequence_only():
    network = CentralNet("small").eval()
    image, mask, metadata = torch.randn(2, 2, 64, 64), torch.ones(2, 1, 64, 64), torch.zeros(2, 2)
    other = image.clone()
    other[:, 1] += 2
    with torch.no_grad():
        before, after = network(image, mask, metadata), network(other, mask, metadata)
    assert torch.equal(before["t1c"], after["t1c"])
    assert not torch.equal(before["t2f"], after["t2f"])
    assert not torch.equal(before["final"], after["final"])


def test_central_net_refuses_other_than_two_sequences():
    with pytest.raises(ConfigError, match="'central_net' takes two sequences"):
        build_evaluator("central_net", ClassifierSettings(sequences=("t1",)), {})


def test_tables_hold_the_rows_of_the_method():
    assert [len(TABLES[name].rows) for name in ("table-3-2", "table-3-3", "table-5-2", "table-5-3")] == [6, 4, 4, 8]
    best = TABLES["table-3-2"].rows[-1]
    assert (best.published["auc"], best.full_options("full")["backbone"]) == (0.842, "resnest50")
    switches = [
        tuple(int(row.options[key]) for key in ("multi_scale", "merge_in", "metadata"))
        for row in TABLES["table-5-3"].rows
    ]
    assert len(set(switches)) == 8
    assert (TABLES["table-5-3"].rows[0].published["auc"], TABLES["table-5-3"].rows[-1].published["auc"]) == (
        0.766,
        0.788,
    )


def test_impossible_rows_of_the_source_are_marked():
    assert all(row.is_impossible for row in TABLES["table-3-2"].rows)
    assert [row.is_impossible for row in TABLES["table-3-3"].rows] == [True, True, False, False]
    assert not any(row.is_impossible for row in TABLES["table-5-2"].rows)


@pytest.mark.parametrize("preset", ["small", "full"])
@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_row_can_be_built_at_every_preset(table, preset):
    for row in TABLES[table].rows:
        build_evaluator(row.classifier, SETTINGS, row.full_options(preset))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    prepare_phantom_cohort(root, n_patients=16, image_size_px=32)
    return root


def config_of(root, **changes):
    classify = {
        "masks": "expert",
        "baselines": ["age_sex"],
        "bootstrap_samples": 100,
        "permutation_samples": 100,
        "markers": {"idh": {"column": "idh", "positive": "mutant", "classifier": "radiomics"}},
        **changes,
    }
    return parse_config(
        {"cohort": {"sheet": str(root / "cohort" / "cohort.csv")}, "folds": {"n_folds": 2}, "classify": classify},
        source="test",
        folder=root,
    )


def test_study_writes_table_comparisons_page_and_figures(prepared):
    result = run_study(config_of(prepared), FAST, run_folder=prepared / "run", progress=Silent())
    write_page(result, config_of(prepared))
    table = pd.read_csv(result.folder / "table.csv").set_index("model")
    assert list(table.index) == ["Hand-made", "Size", "age_sex"]
    assert table.loc["Hand-made", "auc_in_source"] == 0.85
    assert table.loc["Hand-made", "source_row_impossible"] in (True, "True")
    assert np.isnan(table.loc["age_sex", "auc_in_source"])
    for row in table.itertuples():
        assert min(row.sensitivity, row.specificity) - 1e-9 <= row.accuracy
        assert row.accuracy <= max(row.sensitivity, row.specificity) + 1e-9
        assert row.auc_low <= row.auc <= row.auc_high and row.n == 16
    comparisons = pd.read_csv(result.folder / "comparisons.csv")
    assert list(comparisons["model"]) == ["Hand-made", "Size"] and set(comparisons["baseline"]) == {"age_sex"}
    between = pd.read_csv(result.folder / "comparisons_between_rows.csv")
    assert list(between["model"]) == ["Size"] and list(between["other"]) == ["Hand-made"]
    predictions = [pd.read_csv(result.folder / "predictions" / f"{name}.csv") for name in ("size", "hand_made")]
    first, second = (rows.sort_values("patient_id")["probability"].to_numpy() for rows in predictions)
    truth = predictions[0].sort_values("patient_id")["label"].to_numpy()
    assert between.loc[0, "difference"] == pytest.approx(auc(truth, first) - auc(truth, second), abs=1e-4)
    assert between.loc[0, "p_holm"] == between.loc[0, "p_value"]  # one pair
    page = (result.folder / "report.html").read_text()
    assert "age and sex alone" in page and "0.850" in page and "which cannot be" in page
    assert "Size: does not beat age and sex alone beyond chance." in page
    # The source prints no kappa for this table, so there is no column for it.
    assert page.count(">Source</th>") == 4
    for name in ("roc", "reliability_hand_made", "reliability_size"):
        assert (result.folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (result.folder / "figures" / "central_net_weights.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the command alone may take 900 s
def test_study_command_prints_the_table_beside_the_source_and_draws_central_nets_weights(prepared, tmp_path):
    config = config_of(prepared, epochs=1, inner_folds=2, slices_per_case=2, image_size_px=32)
    plain = config.model_dump(mode="json", include={"cohort", "folds", "classify"}, exclude_defaults=True)
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**plain, "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1}})
    )
    arguments = ["study", "table-5-2", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run"), "--marker", "idh"]
    done = subprocess.run(
        [sys.executable, "-m", "glioma_nas", *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    # Lightning's own words would stand between the lines of the progress.
    assert "KiNet fold 2/2" in done.stderr and "GPU available" not in done.stderr
    rows = {row["model"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["ResNet", "ResNeSt", "CentralNet", "KiNet", "age_sex"]
    assert (rows["KiNet"]["auc_in_source"], rows["KiNet"]["kappa_in_source"]) == (0.788, 0.472)
    assert rows["age_sex"]["auc_in_source"] is None
    for row in rows.values():
        assert row["auc_low"] <= row["auc"] <= row["auc_high"] and row["n"] == 16
    folder = tmp_path / "run" / "studies" / "table_5_2_idh_small"
    assert (folder / "figures" / "central_net_weights.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "share of each branch" in page and "KiNet: " in page


def test_study_is_read_back_and_refuses_other_settings(prepared):
    first = run_study(config_of(prepared), FAST, run_folder=prepared / "run", progress=Silent())
    kept = next(first.folder.rglob("fold0/predictions.csv"))
    written = kept.stat().st_mtime_ns
    again = run_study(config_of(prepared), FAST, run_folder=prepared / "run", progress=Silent())
    assert kept.stat().st_mtime_ns == written and again.rows() == first.rows()
    with pytest.raises(StorageError, match="holds this study with other settings, slices or masks"):
        run_study(config_of(prepared, epochs=3), FAST, run_folder=prepared / "run", progress=Silent())


def test_study_is_not_read_back_when_the_slices_were_made_again(prepared, tmp_path):
    shutil.copytree(prepared / "run" / "preprocess", tmp_path / "run" / "preprocess")
    run_study(config_of(prepared), FAST, run_folder=tmp_path / "run", progress=Silent())
    manifest = tmp_path / "run" / "preprocess" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "key": "another"})
    with pytest.raises(StorageError, match="other settings, slices or masks"):
        run_study(config_of(prepared), FAST, run_folder=tmp_path / "run", progress=Silent())


def test_study_refuses_a_marker_the_configuration_lacks(prepared):
    with pytest.raises(ConfigError, match=r"classify.markers has no 'ki67'.*Add it, or name another with --marker"):
        run_study(config_of(prepared), FAST, run_folder=prepared / "run", progress=Silent(), marker="ki67")


def test_study_refuses_a_leaky_split(prepared, tmp_path):
    """One scan of a held-out patient is slipped into the training side, as a slice-level split would do."""
    from glioma_nas.folds import FoldPlan, Folds, load_folds

    shutil.copytree(prepared / "run" / "preprocess", tmp_path / "run" / "preprocess")
    path = tmp_path / "run" / "preprocess" / "folds.json"
    folds = load_folds(path)
    leaky = ((*folds.train(0), folds.test(0)[0]), folds.test(0))
    FoldPlan(folds.seed, (Folds(folds.seed, (leaky, *folds.pairs[1:])),), 0).write(path)
    with pytest.raises(LeakageError, match="of the same patient"):
        run_study(config_of(prepared), FAST, run_folder=tmp_path / "run", progress=Silent())


def test_study_refuses_a_network_masks_provenance_that_leaks(prepared):
    case = read_json(prepared / "run" / "preprocess" / "index.json")["cases"]
    write_json(
        prepared / "cohort" / "provenance.json",
        {case_id: {"network": "unet", "train_patients": [case_id]} for case_id in case},
    )
    config = config_of(prepared, masks="given", mask_provenance="provenance.json")
    with pytest.raises(LeakageError, match="was trained on this patient"):
        run_study(config, FAST, run_folder=prepared / "run", progress=Silent())


def test_study_starts_rows_from_given_weights_and_says_which_backbones_it_has(prepared, tmp_path):
    table = StudyTable("table-y", "Y", "idh", (StudyRow("ResNet", "idh", {"mode": "MIX"}, {}, "resnet"),))
    weights = tmp_path / "weights.pth"
    with pytest.raises(ConfigError, match="no row of table-y with preset small has this backbone; it has small"):
        run_study(
            config_of(prepared), table, run_folder=prepared / "run", progress=Silent(), pretrained={"resnet50": weights}
        )
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    with pytest.raises(ConfigError, match="not weights of 'small_resnet'"):
        run_study(
            config_of(prepared),
            table,
            run_folder=prepared / "run",
            progress=Silent(),
            pretrained={"small_resnet": weights},
        )


def test_study_command_refuses_pretrained_without_a_backbone():
    from glioma_nas.cli.marker_study_commands import _backbone_and_file

    with pytest.raises(ConfigError, match=r"--pretrained w\.pth: give a backbone and its weights file"):
        _backbone_and_file("w.pth")


def test_weights_figure_draws_every_branch():
    figure = weights_figure({"t1c": [0.2] * 4, "central": [0.6] * 4, "t2f": [0.2] * 4})
    assert figure.name == "central_net_weights" and figure.png.startswith(b"\x89PNG")
