"""One page about one new patient: outline, volume, markers, and what the reader must know before using them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.prepared import PreparedCase
from glioma_nas.report.document import (
    Bullets,
    Caution,
    Facts,
    Figures,
    Headline,
    Paragraph,
    Picture,
    Section,
    Table,
    interval,
    number,
    plural,
    show_interval,
    show_number,
    text,
)
from glioma_nas.report.overlays import PREDICTION_COLOUR, overlay
from glioma_nas.report.page import Page, render

SHOWN_SLICES = 3


def render_case(record: Mapping[str, Any], case: PreparedCase, mask: NDArray[np.uint8], run: FrozenRun) -> str:
    """Return the page as self-contained HTML; every text in it is escaped.

    Args:
        record: What ``prediction.json`` will hold.
        case: The prepared case.
        mask: Tumour on the prepared slices, uint8 (Z, H, W), 0 or 1.
        run: The run that predicted.
    """
    now = datetime.datetime.now(datetime.UTC)
    return render(
        Page(
            title=f"Case {record['case_id']}",
            subtitle="glioma_nas prediction for a new patient",
            facts=[
                ("Made", f"{now:%d %B %Y, %H:%M} UTC".removeprefix("0")),
                ("Run", str(record["run"]["name"])),
                ("Sequences", ", ".join(case.present)),
                ("glioma_nas", str(record["run"]["glioma_nas"])),
            ],
            disclaimer=str(record["disclaimer"]),
            headlines=_headlines(record),
            sections=[
                _warnings(record),
                _segmentation(record, case, mask),
                _markers(record),
                _subtype(record),
                _limits(run),
            ],
        )
    )


def _headlines(record: Mapping[str, Any]) -> Sequence[Headline]:
    found = record["segmentation"]
    ends = show_interval(found["volume_lowest_ml"], found["volume_highest_ml"], 1)
    shown = [Headline("Tumour volume", f"{show_number(found['volume_ml'], 1)} ml", f"networks alone: {ends} ml")]
    for marker in record["markers"]:
        value = show_number(marker["probability"], 2)
        ends = show_interval(marker["lowest"], marker["highest"], 2)
        detail = f"{_called(marker)}; spread {ends}" if value else marker["reason"].removeprefix("not predicted: ")
        shown.append(Headline(f"P({marker['positive_class']})", value or "not predicted", detail))
    if record["subtype"]:
        found = record["subtype"]
        detail = f"probability {show_number(found['probabilities'][found['call']], 2)}" if found["call"] else ""
        shown.append(Headline("Integrated subtype", found["call"] or "no call", detail or found["reason"]))
    return shown


def _called(marker: Mapping[str, Any]) -> str:
    return str(marker["reason"] or marker["call"])


def _warnings(record: Mapping[str, Any]) -> Section:
    section = Section("notices", "Read first")
    if record["warnings"]:
        section.add(*(Caution(f"{warning[0].upper()}{warning[1:]}.") for warning in record["warnings"]))
    else:
        section.add(Paragraph("The scans are as the run expects them; nothing was replaced or left out."))
    if record["quality_flags"]:
        section.add(
            Caution(f"Quality control, look at the scans: {'; '.join(record['quality_flags'])}."),
        )
    else:
        section.add(Paragraph("Quality control raised no flag."))
    return section


def _segmentation(record: Mapping[str, Any], case: PreparedCase, mask: NDArray[np.uint8]) -> Section:
    section, found = Section("segmentation", "Segmentation"), record["segmentation"]
    dice = show_number(found["out_of_fold_dice"], 3)
    section.add(
        Facts(
            (
                ("Network", f"{found['network']}, mean of {plural(found['n_members'], 'fold')}"),
                ("Volume", f"{show_number(found['volume_ml'], 2)} ml on the grid of {found['mask_on']}"),
                (
                    "Volume by single networks",
                    f"{show_interval(found['volume_lowest_ml'], found['volume_highest_ml'], 2)} ml on that grid",
                ),
                ("Agreement of the networks", f"mean Dice {show_number(found['member_dice'], 3)} with their mean"),
                ("Dice on patients of the run", f"{dice}, out-of-fold" if dice else "not measured"),
            )
        )
    )
    images, indices = case.images(), shown_slices(mask, case.brain_px)
    empty = np.zeros(mask.shape[1:], dtype=np.uint8)
    channels = list(case.channels(case.present))
    pictures = [
        Picture(
            overlay(
                f"slice-{index}",
                np.asarray(images[index][channels]),
                case.present,
                empty,
                mask[index],
                aspect=case.spacing_mm[1] / case.spacing_mm[0],
                alt=f"Slice {index + 1} of {case.n_slices} with the outline of the predicted tumour",
            ),
            f"Slice {index + 1} of {case.n_slices}, counted from below.",
        )
        for index in indices
    ]
    which = (
        "Slices with the largest predicted tumour area" if mask.any() else "Nothing was outlined; slice with most brain"
    )
    section.add(
        Figures(
            f"{which}; the patient's right is on the left.",
            pictures,
            ((PREDICTION_COLOUR, "predicted outline"),) if mask.any() else (),
        )
    )
    return section


def shown_slices(mask: NDArray[np.uint8], brain_px: Sequence[int]) -> list[int]:
    """Return the slices with the largest tumour area, in order; of an empty mask that with most brain.

    Args:
        mask: uint8 (Z, H, W), 0 or 1.
        brain_px: Brain pixels of each of the Z slices.
    """
    areas = mask.sum(axis=(1, 2), dtype=np.int64)
    if not areas.any():
        return [int(np.argmax(brain_px))]
    largest = np.argsort(-areas, kind="stable")[:SHOWN_SLICES]
    return sorted(int(index) for index in largest if areas[index])


def _markers(record: Mapping[str, Any]) -> Section:
    section = Section("markers", "Molecular markers")
    if not record["markers"]:
        section.add_missing("Markers: the run has no classifier")
        return section
    rows = [
        {**marker, "call": _called(marker), **{f"auc_{key}": value for key, value in marker["auc"].items()}}
        for marker in record["markers"]
    ]
    section.add(
        Table(
            "markers",
            "Probability of the positive class: mean over the folds' classifiers and altered copies of the case, with "
            "the 5th and the 95th percentile of these members. No call is made where they disagree. The AUC is that of "
            "the same classifiers on the run's own patients, out-of-fold.",
            (
                text("positive_class", "Positive class"),
                number("probability", "Probability", 3),
                interval("lowest", "highest", 3, heading="5th to 95th percentile"),
                number("threshold", "Threshold", 3),
                text("call", "Call"),
                number("auc_value", "AUC", 2),
                interval("auc_low", "auc_high", 2),
                number("auc_n", "n"),
            ),
            rows,
        )
    )
    section.add(Bullets(tuple(f"{marker['marker']}: {marker['statement']}" for marker in record["markers"])))
    return section


def _subtype(record: Mapping[str, Any]) -> Section:
    section, found = Section("subtype", "Integrated subtype"), record["subtype"]
    if found is None:
        section.add_missing("Integrated subtype: the run has no rules for it")
        return section
    section.add(Caution(found["disclaimer"]))
    said = f"{found['call']}" if found["call"] else f"No call: {found['reason']}"
    test = found["next_test"]
    section.add(
        Facts(
            (
                ("Result", said),
                ("CNS WHO grade", found["grade"] or "none follows"),
                ("From predicted markers", _listed(found["predicted"]) or "none"),
                ("Measured in tissue", _listed(found["measured"]) or "none"),
                ("Most informative test", f"{test} ({found['next_test_bits']:.2f} bit)" if test else "none is open"),
            )
        )
    )
    rows = [{"outcome": name, "probability": value} for name, value in found["probabilities"].items()]
    if not rows:
        return section
    columns = (text("outcome", "Outcome"), number("probability", "Probability", 3))
    caption = "Outcomes of the rules, markers taken as independent given the images."
    section.add(Table("subtype", caption, columns, rows))
    return section


def _listed(states: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in states.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _limits(run: FrozenRun) -> Section:
    section = Section("limits", "Limits")
    patients = len({case.patient_id for case in run.cohort.cases.values()})
    section.add(
        Paragraph(
            f"Networks and classifiers learnt from {plural(patients, 'patient')} of one cohort. How well they do on "
            "scans from elsewhere is not measured here; the spread of the members is no confidence interval, and "
            "all of them can be wrong together."
        )
    )
    return section
