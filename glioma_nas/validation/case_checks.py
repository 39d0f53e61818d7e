"""Check one case: each file by itself, then its files against each other. Runs in worker processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import nibabel as nib
import numpy as np

from glioma_nas.cohort import Case
from glioma_nas.grids import turn_onto, turned_grid
from glioma_nas.validation.file_checks import FileCheck, Voxels
from glioma_nas.validation.findings import CaseReport, FileFacts, Finding, Severity

_MAX_SHIFT_VOXELS = 0.1
_OUTSIDE_SHARE = 0.05
_TUMOUR_ML = (0.1, 500.0)


@dataclass(frozen=True)
class CaseTask:
    """What a worker gets.

    Attributes:
        case: The case.
        sequences: Sequences it should have.
        missing: Severity of one that is missing.
        mask_labels: Values a mask may hold besides 0.
        one_grid: Whether all its files must lie on one grid, because no step of the run brings them there.
    """

    case: Case
    sequences: tuple[str, ...]
    missing: Severity
    mask_labels: tuple[int, ...]
    one_grid: bool


def check_case(task: CaseTask) -> CaseReport:
    """Read every file of a case completely and return what was found."""
    case = task.case
    findings = _missing(task)
    facts: list[FileFacts] = []
    mask: Voxels | None = None
    if case.mask is not None:
        check = FileCheck(case.mask, case.case_id, "mask", task.mask_labels)
        facts.append(check.facts)
        findings += check.findings
        mask = None if check.data is None else check.data != 0
        findings += _tumour_size(case, check.facts, mask)
    for name, path in case.images.items():
        # One scan at a time: a case of large volumes would not fit into memory for every worker.
        check = FileCheck(path, case.case_id, name, task.mask_labels)
        facts.append(check.facts)
        findings += check.findings
        told = any(item.code == "mask-outside" for item in findings)  # one scan is enough to say it
        if not told and mask is not None and check.data is not None and mask.any():
            outside = _share_outside(mask, facts[0], check.data, check.facts)
            if outside > _OUTSIDE_SHARE:
                findings.append(
                    Finding(
                        "warning",
                        "mask-outside",
                        f"{100 * outside:.0f} % of the mask lies where {name} is 0",
                        "look whether mask and scan belong together and skull stripping cut the tumour",
                        case.case_id,
                        "mask",
                    )
                )
    findings += _grids(task, facts)
    findings += _copies(case, facts)
    return CaseReport(case.case_id, case.patient_id, tuple(facts), tuple(findings))


def _missing(task: CaseTask) -> list[Finding]:
    case = task.case
    findings = [
        Finding(
            task.missing,
            "missing-sequence",
            f"{name} is missing",
            "add the file, or set cohort.missing_sequence to 'exclude', 'zero', 'indicator' or 'drop'",
            case.case_id,
            name,
        )
        for name in task.sequences
        if name not in case.images
    ]
    if case.mask is None:
        findings.append(
            Finding("note", "no-mask", "has no mask", "it is predicted but not trained on", case.case_id, "mask")
        )
    return findings


def _tumour_size(case: Case, facts: FileFacts, mask: Voxels | None) -> list[Finding]:
    if mask is None or not facts.spacing_mm or not mask.any():
        return []
    volume_ml = int(np.count_nonzero(mask)) * float(np.prod(facts.spacing_mm)) / 1000
    if _TUMOUR_ML[0] <= volume_ml <= _TUMOUR_ML[1]:
        return []
    text = f"the mask measures {volume_ml:.3g} ml"
    return [Finding("warning", "mask-size", text, "look at the mask: specks, or background?", case.case_id, "mask")]


def _share_outside(mask: Voxels, mask_facts: FileFacts, scan: Voxels, scan_facts: FileFacts) -> float:
    """Return the share of a mask that lies where a scan is 0; 0 where they are not on one grid."""
    if not (mask_facts.affine and scan_facts.affine):
        return 0.0
    turned, _ = turn_onto(mask, np.array(mask_facts.affine), np.array(scan_facts.affine))
    if turned.shape != scan.shape:
        return 0.0
    return float(np.count_nonzero(scan[turned] == 0)) / int(np.count_nonzero(turned))


def _grids(task: CaseTask, facts: list[FileFacts]) -> list[Finding]:
    placed = [item for item in facts if item.affine and item.voxel_hash]
    scans = [item for item in placed if item.column != "mask"]
    masks = [item for item in placed if item.column == "mask"]
    if not scans:
        return []
    findings = []
    # Axes may be stored in another order or direction: a mask is turned to the scan it was drawn on.
    if masks and all(_apart(_turned(masks[0], scan), scan) for scan in scans):
        findings.append(
            Finding(
                "error",
                "mask-grid",
                f"the mask lies on no scan's grid: {_apart(masks[0], scans[0])} of {scans[0].column}",
                "resample the mask, with nearest neighbour, to the scan it was drawn on",
                task.case.case_id,
                "mask",
            )
        )
    for other in scans[1:]:
        if difference := _apart(other, scans[0]):
            findings.append(
                Finding(
                    "error" if task.one_grid else "note",
                    "scan-grid",
                    f"{other.column}: {difference} of {scans[0].column}",
                    "add a registering step to preprocess.steps, or co-register the case's scans to one grid"
                    if task.one_grid
                    else "nothing: a preprocess step brings the scans together",
                    task.case.case_id,
                    other.column,
                )
            )
    return findings


def _turned(facts: FileFacts, other: FileFacts) -> FileFacts:
    """Return the facts of a file as they would be with its axes stored like another one's."""
    shape, affine = turned_grid(facts.shape, np.array(facts.affine), np.array(other.affine))
    return replace(
        facts,
        shape=shape,
        affine=tuple(tuple(row) for row in affine.tolist()),
        orientation="".join(nib.aff2axcodes(affine)),
    )


def _apart(one: FileFacts, other: FileFacts) -> str:
    """Say how two grids differ; empty when they do not."""
    if one.shape != other.shape:
        return f"shape {'×'.join(map(str, one.shape))} differs from {'×'.join(map(str, other.shape))}"
    corners = np.array([[x, y, z, 1] for x in (0, one.shape[0]) for y in (0, one.shape[1]) for z in (0, one.shape[2])])
    shift_mm = float(np.abs(corners @ (np.array(one.affine) - np.array(other.affine)).T).max())
    if shift_mm <= _MAX_SHIFT_VOXELS * min(one.spacing_mm):
        return ""  # whatever the axes are called: at about 45 degrees rounding decides
    if one.orientation != other.orientation:
        return f"orientation {one.orientation} differs from {other.orientation}"
    return f"position differs by up to {shift_mm:.2f} mm from that"


def _copies(case: Case, facts: list[FileFacts]) -> list[Finding]:
    scans = [item for item in facts if item.voxel_hash and item.column != "mask"]
    return [
        Finding(
            "error",
            "same-scan",
            f"{one.column} and {other.column} hold identical voxels",
            "one was filed under the wrong name; replace it or empty the cell",
            case.case_id,
            other.column,
        )
        for one, other in combinations(scans, 2)
        if one.voxel_hash == other.voxel_hash
    ]
