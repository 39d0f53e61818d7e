"""Where the figures come from, and what this report does not know."""

from __future__ import annotations

from collections.abc import Sequence

from glioma_nas.config import RunConfig
from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.pipeline import versions
from glioma_nas.report.document import Bullets, Facts, Paragraph, Section, Table, number, text
from glioma_nas.report.further_evidence import FurtherEvidence
from glioma_nas.report.records import RunRecords
from glioma_nas.report.segmentation_section import device

DISCLAIMER = (
    "Research use only. These are predictions from images; they are no diagnosis and not a WHO integrated diagnosis, "
    "which needs tissue."
)


def run_id(records: RunRecords) -> str:
    """Return twelve hexadecimal digits that stand for the inputs of every finished stage."""
    keys = {name: manifest.get("key", "") for name, manifest in records.manifests.items()}
    return sha256_text(canonical_json(keys))[:12]


def build_environment(records: RunRecords, config: RunConfig) -> Section:
    """List versions, devices and times."""
    section = Section("environment", "Environment")
    operators = records.manifests.get("latency", {}).get("results", {})
    section.add(
        Facts(
            (
                ("Training device", config.device),
                ("Latency of networks", device(records) if records.latency else "not measured"),
                ("Latency table", f"{operators['entries']} operators" if "entries" in operators else "not measured"),
                ("Seed", str(config.seed)),
                ("Run", run_id(records)),
            )
        )
    )
    stages = [
        {
            "stage": name,
            "wall_s": manifest.get("wall_s"),
            "seed": manifest.get("seed"),
            "key": str(manifest.get("key", ""))[:12],
        }
        for name, manifest in records.manifests.items()
    ]
    columns = (text("stage", "Stage"), number("wall_s", "Wall time, s", 1), number("seed", "Seed"), text("key", "Key"))
    section.add(
        Table(
            "stages",
            "Finished stages; the key stands for configuration, seed and inputs. The time of a resumed stage counts "
            "from its last start.",
            columns,
            stages,
        )
    )
    recorded = [manifest["versions"] for manifest in records.manifests.values() if manifest.get("versions")]
    shown = recorded[-1] if recorded else versions()
    rows = [{"package": name, "version": value} for name, value in shown.items()]
    section.add(
        Table(
            "versions",
            "Versions that can change a result.",
            (text("package", "Package"), text("version", "Version")),
            rows,
        )
    )
    if len({canonical_json(item) for item in recorded}) > 1:
        section.add(Paragraph("The stages of this run were made with different versions; the table shows the last."))
    return section


def build_limits(
    records: RunRecords, config: RunConfig, sections: Sequence[Section], further: FurtherEvidence
) -> Section:
    """Say what this report does not know."""
    section = Section("limits", "What this report does not know")
    search = records.manifests.get("search", {}).get("results", {})
    patients = len({case.patient_id for case in records.cohort.cases.values()})
    items = [
        str(search["search_patients_note"])
        if "search_patients_note" in search
        else "Which patients the architecture search saw was not recorded; out-of-fold figures may be flattered by it.",
        f"All figures but those of section 'Other patients' come from one cohort of {patients} patients; beyond those, "
        "nothing was tested."
        if further.measured
        else f"All figures come from one cohort of {patients} patients; other scanners, sites and populations were not "
        "tested.",
        "Intervals say how figures vary with the patients drawn. They leave out how they vary with another seed: each "
        "network was trained once for each fold"
        + (", and the comparison over seeds has a split and a training of its own." if further.comparisons else "."),
        "The number of epochs was fixed beforehand and every network is the last of its training: nothing was chosen "
        "on test patients.",
        "Latency holds for the device, engine, number of threads and input size named beside it and for no other.",
        "Millimetres and millilitres are as right as the voxel sizes that the scans declare.",
    ]
    if config.classify.markers:
        items.append(
            "Labels are as the sheet gives them; cases without a label are left out of their marker, and calibration "
            "at another prevalence is unknown."
        )
    missing = [what for part in sections for what in part.missing]
    items += [f"Not measured: {what[0].lower()}{what[1:]}." for what in missing]
    section.add(Bullets(items), Paragraph(DISCLAIMER))
    return section
