"""What other commands found out about a run: `evaluate` on patients from elsewhere, `compare` over further seeds.

The report takes both over where ``report.evaluations`` and ``report.comparisons`` name their folders, and refuses
those of another run: an evaluation by the manifests of the stages it applied, a comparison by folds, settings of
search, training and latency, and the strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from glioma_nas.config import RunConfig, load_config
from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, sha256_file
from glioma_nas.folds import Folds, load_folds
from glioma_nas.pipeline import CONFIG_FILE, MANIFEST
from glioma_nas.report.document import (
    Caution,
    Paragraph,
    Section,
    Table,
    interval,
    number,
    sentence,
    text,
)

APPLIED_STAGES = ("preprocess", "search", "train", "classify")
EVALUATION_FILE = "validation.json"
COMPARISON_FILE = "comparison.csv"
_FOLDS = Path("shared") / "preprocess" / "folds.json"
_CONFIG = Path("shared") / CONFIG_FILE
# What cannot change a comparison: it trains the networks found alone, on one device and without distillation.
_APART: Mapping[str, set[str]] = {
    "search": {"tensorboard"},
    "train": {"tensorboard", "devices", "baselines", "baseline_options"}
    | {"kd_weight", "kd_temperature", "kd_direction", "kd_norm"},
    "latency": {"shared_table"},
}


@dataclass(frozen=True)
class FurtherEvidence:
    """What lies beside a run.

    Attributes:
        evaluations: What each ``validation.json`` holds.
        comparisons: Rows of each ``comparison.csv``.
    """

    evaluations: tuple[Mapping[str, Any], ...] = ()
    comparisons: tuple[pd.DataFrame, ...] = ()

    @property
    def measured(self) -> tuple[Mapping[str, Any], ...]:
        """The evaluations that measured a Dice or an AUC: others say nothing about other patients."""
        return tuple(
            one
            for one in self.evaluations
            if "dice" in one["segmentation"] or any("metrics" in marker for marker in one["markers"].values())
        )


def applied_stages(run: Path) -> dict[str, str]:
    """Return the hash of the manifest of every stage of a run that is applied to new patients."""
    manifests = {stage: run / stage / MANIFEST for stage in APPLIED_STAGES}
    return {stage: sha256_file(path) for stage, path in manifests.items() if path.is_file()}


def read_evidence(
    evaluations: Sequence[Path], comparisons: Sequence[Path], *, run: Path, config: RunConfig, folds: Folds
) -> FurtherEvidence:
    """Read the folders that `evaluate` and `compare` wrote.

    Args:
        evaluations: Of ``report.evaluations``.
        comparisons: Of ``report.comparisons``.
        run: The run folder.
        config: Its configuration.
        folds: Its folds.

    Raises:
        StorageError: A folder holds no such result, or that of another run.
    """
    return FurtherEvidence(
        tuple(_evaluation(folder, run) for folder in evaluations),
        tuple(_comparison(folder, config, folds) for folder in comparisons),
    )


def build(found: FurtherEvidence) -> Section:
    """Show what was found; a run without it says how to get it."""
    section = Section("further", "Other patients, other seeds")
    if found.evaluations:
        section.add(_evaluation_table(found.evaluations))
        for one in found.evaluations:
            if one.get("other_code"):
                section.add(Caution(sentence(f"{one['cohort']}: {one['other_code']}")))
        section.add(
            Paragraph(
                "Networks, classifiers and thresholds were frozen. How these patients differ, calibration and the "
                "cases left out stand on the page of each evaluation."
            )
        )
    else:
        section.add(
            Paragraph(
                "Patients from elsewhere: not measured. `glioma-nas evaluate RUN COHORT` applies this run to them, and "
                "report.evaluations shows the result here."
            )
        )
    for position, rows in enumerate(found.comparisons):
        section.add(_comparison_table(rows, position))
    if not found.comparisons:
        section.add(
            Paragraph(
                "Other seeds of the search: not measured. `glioma-nas compare CONFIG --seeds N` repeats it, and "
                "report.comparisons shows the result here."
            )
        )
    return section


def _evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[dict[str, Any]] = []
    for one in evaluations:
        where = {"cohort": one["cohort"], "network": one["network"]}
        for key, name in (("dice", "Dice"), ("hd95_mm", "HD95, mm")):
            if key in one["segmentation"]:
                own = one["out_of_fold_dice"] if key == "dice" else None
                rows.append({**where, "figure": name, **one["segmentation"][key], "in_the_run": own})
        for name, marker in one["markers"].items():
            if "metrics" in marker:
                own = marker["in_the_run"]["value"]
                rows.append({**where, "figure": f"AUC, {name}", **marker["metrics"]["auc"], "in_the_run": own})
    columns = (
        text("cohort", "Cohort"),
        text("network", "Network"),
        text("figure", "Figure"),
        number("value", "Value", 3),
        interval("low", "high", 3),
        number("n", "n"),
        number("in_the_run", "In this run", 3),
    )
    caption = (
        "Patients from elsewhere, none of whom the run was made with; n counts patients. Dice here is of the mean of "
        "all folds' networks, in this run of the one network that had not seen the patient. An AUC depends on the "
        "patients it is measured on, and the two populations differ: a difference is not of the classifier alone."
    )
    return Table("evaluations", caption, columns, rows)


def _comparison_table(rows: pd.DataFrame, position: int) -> Table:
    columns = (
        text("strategy", "Strategy"),
        number("seeds", "Seeds"),
        number("dice", "Dice", 3),
        interval("dice_low", "dice_high", 3),
        number("latency_ms", "Latency, ms", 2),
        interval("latency_ms_low", "latency_ms_high", 2),
    )
    name = "comparison" if position == 0 else f"comparison-{position + 1}"
    caption = (
        f"Searches on the folds of this run, n = {int(rows.seeds.sum())}, each trained from scratch without "
        "distillation and scored on the test patients of fold 0: means over seeds with their 95 % interval (Student's "
        "t)."
    )
    clean = rows.astype(object).where(rows.notna(), None)
    return Table(
        name, caption, columns, [{str(key): value for key, value in row.items()} for row in clean.to_dict("records")]
    )


def _evaluation(folder: Path, run: Path) -> Mapping[str, Any]:
    file = folder / EVALUATION_FILE
    if not file.is_file():
        raise StorageError(f"report.evaluations: {folder} holds no {EVALUATION_FILE}; give the --out of `evaluate`")
    results: Mapping[str, Any] = read_json(file)
    if results.get("applied") != applied_stages(run):
        raise StorageError(
            f"report.evaluations: {folder} was made with another run, or with this one before it changed; run "
            "`glioma-nas evaluate` again"
        )
    return results


def _comparison(folder: Path, config: RunConfig, folds: Folds) -> pd.DataFrame:
    file = folder / COMPARISON_FILE
    if not file.is_file():
        raise StorageError(f"report.comparisons: {folder} holds no {COMPARISON_FILE}; give the --out of `compare`")
    if not (folder / _FOLDS).is_file() or load_folds(folder / _FOLDS).hash != folds.hash:
        raise StorageError(
            f"report.comparisons: {folder} was made on other folds than this run; compare with the run's own "
            "configuration"
        )
    if (folder / _CONFIG).is_file():
        made_with = load_config(folder / _CONFIG)
        other = [name for name in _APART if _settings(made_with, name) != _settings(config, name)]
        if other:
            raise StorageError(
                f"report.comparisons: {folder} was made with other settings of {', '.join(other)} than this run; "
                "compare with the run's own configuration"
            )
    rows = pd.read_csv(file)
    missing = {"strategy", "seeds", "dice", "dice_low", "dice_high", "latency_ms"} - set(rows.columns)
    if missing:
        raise StorageError(f"{file}: column {', '.join(sorted(missing))} missing; run `glioma-nas compare` again")
    if config.search.strategy not in set(rows.strategy):
        raise StorageError(
            f"report.comparisons: {folder} has no row of this run's strategy '{config.search.strategy}'; name it in "
            "`glioma-nas compare --strategies`"
        )
    return rows


def _settings(config: RunConfig, section: str) -> dict[str, Any]:
    """Return a section without what cannot change a comparison; files count by their names, for a run can be moved."""
    settings = getattr(config, section).model_dump(exclude=_APART[section])
    return {key: value.name if isinstance(value, Path) else value for key, value in settings.items()}
