"""What the cohort check finds: facts about files, and findings with severity and remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        severity: ``error`` stops or spoils a run; ``warning`` may; ``note`` is worth knowing.
        code: Short name of the kind of finding, such as ``not-finite``.
        message: What was found, with figures.
        remedy: What to do.
        case_id: The case, or None for the cohort as a whole.
        column: Sequence, ``mask`` or label column, or None.
    """

    severity: Severity
    code: str
    message: str
    remedy: str
    case_id: str | None = None
    column: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class FileFacts:
    """What one NIfTI file holds, as far as it could be read.

    Attributes:
        column: Sequence or ``mask``.
        shape: Voxels along the file's own axes.
        spacing_mm: Voxel sides.
        orientation: Anatomical direction of the three axes, such as ``RAS``.
        tilt_deg: Angle between the file's axes and the nearest anatomical ones.
        affine: (4, 4) rows, voxel index → millimetres, RAS+.
        dtype: How voxels are stored.
        low: Smallest value.
        high: Largest value.
        zero_share: Share of voxels that are 0, in [0, 1].
        voxel_hash: Hash of the values, whatever the axes' order and direction, or None when nothing could be read.
        labels: Mask value → voxels; empty for scans.
    """

    column: str
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    tilt_deg: float = 0.0
    affine: tuple[tuple[float, ...], ...] = ()
    dtype: str = ""
    low: float | None = None
    high: float | None = None
    zero_share: float | None = None
    voxel_hash: str | None = None
    labels: Mapping[str, int] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class CaseReport:
    """What the check of one case found."""

    case_id: str
    patient_id: str
    files: tuple[FileFacts, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class FindingGroup:
    """All findings of one kind, as the terminal and the top of the page show them."""

    severity: Severity
    code: str
    count: int
    cases: tuple[str, ...]
    message: str
    remedy: str


def grouped(findings: Sequence[Finding]) -> list[FindingGroup]:
    """Collect findings by severity and code, the worst and most frequent first."""
    kinds: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.severity, finding.code), []).append(finding)
    groups = [
        FindingGroup(
            severity,
            code,
            len(members),
            tuple(dict.fromkeys(item.case_id for item in members if item.case_id is not None)),
            members[0].message,
            members[0].remedy,
        )
        for (severity, code), members in kinds.items()
    ]
    return sorted(groups, key=lambda group: (SEVERITIES.index(group.severity), -group.count, group.code))


def split_remedy(text: str) -> tuple[str, str]:
    """Split one of our error messages, "what is wrong; what to do", into its two parts.

    >>> split_remedy("a.nii: truncated; copy the file again")
    ('a.nii: truncated', 'copy the file again')
    """
    what, _, remedy = text.rpartition("; ")
    return (what, remedy) if what else (text, "correct it and check again")
