"""The report's chapter on markers: always beside age and sex, and no verdict that the statistics do not give."""

from __future__ import annotations

import pandas as pd
import pytest
from report_run import parse

from glioma_nas.report.marker_section import baseline_sentence
from glioma_nas.report.records import MarkerRecords


@pytest.mark.parametrize(("p_holm", "beats"), [(0.03, True), (0.09, False)])
def test_baseline_sentence_says_what_the_corrected_comparison_says(p_holm: float, beats: bool) -> None:
    frame = pd.DataFrame(
        {
            "case_id": [f"c{number}" for number in range(20)],
            "patient_id": [f"p{number}" for number in range(20)],
            "fold": 0,
            "label": [0, 1] * 10,
            "threshold": 0.5,
        }
    )
    good = frame.assign(probability=[0.3 + 0.4 * (number % 2) + 0.001 * number for number in range(20)])
    poor = frame.assign(probability=[(number * 7 % 20) / 20 for number in range(20)])
    found = MarkerRecords(good, {}, poor, {}, {"auc_minus_baseline": {"beats": beats, "p_holm": p_holm}})
    sentence = baseline_sentence(found)
    assert sentence is not None and sentence[1] is beats
    assert ("corrected by Holm" in sentence[0]) is not beats


@pytest.mark.slow
def test_report_compares_marker_with_baseline(report_html: str) -> None:
    text = " ".join("".join(parse(report_html).text).split())
    assert "age and sex alone: AUC difference" in text
    assert "0.70 to 1.00; n = 11, 7 positive, out-of-fold, patient level, 2 folds" in text
    assert "The architecture was searched on the training patients of fold 0 alone." in text
