"""The code behind a stored classifier is told apart from any other, and only by what decides its predictions."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from glioma_nas import registry
from glioma_nas.classifier_code import _own_modules, classifier_code, require_same_code
from glioma_nas.errors import StorageError
from glioma_nas.registry import load_file

PLUGIN = """
from glioma_nas.marker_evaluator import MarkerEvaluator


class Scaled(MarkerEvaluator):
    def predict(self, folder, cases, *, device="cpu"):
        from glioma_nas.local.scale_of_a_test import SCALE

        return [case.age / SCALE for case in cases]
"""


def test_code_of_a_classifier_is_the_same_at_every_call_and_another_for_another_one() -> None:
    idh, kinet = (registry.classifiers.get(name) for name in ("idh", "kinet"))
    assert classifier_code(idh) == classifier_code(idh) != classifier_code(kinet)
    assert len(classifier_code(idh)) == 12


def test_change_in_what_a_classifier_imports_of_its_package_changes_its_code(tmp_path: Path) -> None:
    helper, plugin = tmp_path / "scale_of_a_test.py", tmp_path / "classifier_of_a_test.py"
    helper.write_text("SCALE = 100\n")
    plugin.write_text(PLUGIN)
    for file in (helper, plugin):
        load_file(file)
    classifier = import_module("glioma_nas.local.classifier_of_a_test").Scaled
    before = classifier_code(classifier)
    helper.write_text("SCALE = 50\n")
    assert classifier_code(classifier) != before
    helper.write_text("SCALE = 100\n")
    assert classifier_code(classifier) == before


def test_change_in_a_baseline_network_leaves_a_classifiers_code_alone() -> None:
    found = _own_modules("glioma_nas.plugins.idh")
    assert {"glioma_nas.plugins.idh", "glioma_nas.plugins.backbones", "glioma_nas.plugins.split_attention"} <= found
    assert "glioma_nas.plugins.nas_unet" not in found and "glioma_nas.plugins.subtype" not in found


def test_record_without_its_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"\(unknown, not recorded; here .*\), which may read a case .*: train it"):
        require_same_code({}, registry.classifiers.get("idh"), folder=tmp_path, remedy="train it again")
