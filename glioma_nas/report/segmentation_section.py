"""Segmentation: out-of-fold Dice of every network, overlays, failures, latency, and the one against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from glioma_nas.config import RunConfig
from glioma_nas.report.charts import NetworkPoint, dice_chart, tradeoff_chart
from glioma_nas.report.document import (
    Caution,
    Column,
    Figures,
    Paragraph,
    Picture,
    Row,
    Section,
    Subheading,
    Table,
    interval,
    number,
    plural,
    show_number,
    text,
)
from glioma_nas.report.figures import Figure
from glioma_nas.report.intervals import PatientEstimate, estimate, mean, median
from glioma_nas.report.overlays import PREDICTION_COLOUR, TRUTH_COLOUR, choose_slice, overlay
from glioma_nas.report.records import RunRecords
from glioma_nas.seeding import numpy_generator

FAILURE_DICE = 0.5
_MAX_PANELS = 3


@dataclass(frozen=True)
class NetworkSummary:
    """What the out-of-fold masks of one network say.

    Attributes:
        cases: Its rows with a known Dice.
        dice: Mean over patients.
        dice_search_fold: The same for the test patients of the fold the search was done in; none when not measured.
        hd95: Median over patients of the cases where both masks hold tumour; none when not measured.
    """

    cases: pd.DataFrame
    dice: PatientEstimate
    dice_search_fold: PatientEstimate | None
    hd95: PatientEstimate | None


def summarise(records: RunRecords, config: RunConfig) -> dict[str, NetworkSummary]:
    """Summarise every network that has a Dice, in the order of dice.csv."""
    if records.dice is None:
        return {}
    fold = search_fold(records)
    found: dict[str, NetworkSummary] = {}
    for network in records.dice["network"].unique().tolist():
        cases = records.dice[(records.dice["network"] == network) & records.dice["dice"].notna()]
        generator = numpy_generator(config.seed, "report", "segmentation", network)
        dice = estimate(cases["dice"].tolist(), cases["patient_id"].tolist(), generator, statistic=mean)
        if dice is None:
            continue
        inside = cases[cases["fold"] == fold]
        distances = cases[cases["hd95_mm"].notna()] if "hd95_mm" in cases.columns else cases.iloc[:0]
        hd95 = (
            estimate(distances["hd95_mm"].tolist(), distances["patient_id"].tolist(), generator, statistic=median)
            if len(distances)
            else None
        )
        found[network] = NetworkSummary(
            cases=cases,
            dice=dice,
            dice_search_fold=estimate(
                inside["dice"].tolist(), inside["patient_id"].tolist(), generator, statistic=mean
            ),
            hd95=hd95,
        )
    return found


def search_fold(records: RunRecords) -> int | None:
    """Return the fold on whose training patients the architecture was searched; none when not recorded."""
    fold = records.manifests.get("search", {}).get("results", {}).get("search_fold")
    return None if fold is None else int(fold)


def main_network(networks: Sequence[str]) -> str:
    """Return the network that overlays and failures are shown of: the student when there is one."""
    return "student" if "student" in networks else networks[0]


def build(
    records: RunRecords, config: RunConfig, summaries: Mapping[str, NetworkSummary], colours: Mapping[str, str]
) -> Section:
    """Compare the networks and show cases."""
    section = Section("segmentation", "Segmentation")
    if not summaries:
        section.add_missing("Dice of the out-of-fold masks")
        _add_latency(section, records)
        return section
    section.add(_table(records, summaries))
    if len(summaries) > 1:
        section.add(_paired(config, summaries))
    generator = numpy_generator(config.seed, "report", "jitter")
    values = {name: summary.cases["dice"].tolist() for name, summary in summaries.items()}
    pictures = [Picture(dice_chart(values, colours, generator), "Every dot is a case; box: quartiles, thick: median.")]
    points = [
        NetworkPoint(name, summary.dice, float(records.latency[name]["median_ms"]))
        for name, summary in summaries.items()
        if name in records.latency
    ]
    if points:
        caption = f"Accuracy against latency on {device(records)}; the line joins those that no other beats in both."
        pictures.append(Picture(tradeoff_chart(points, colours), caption))
    section.add(Figures("Out-of-fold Dice, and what it costs in time.", pictures))
    _add_latency(section, records)
    network = main_network(list(summaries))
    _add_overlays(section, records, config, network, summaries[network].cases)
    _add_failures(section, network, summaries[network].cases)
    return section


def _table(records: RunRecords, summaries: Mapping[str, NetworkSummary]) -> Table:
    fold = search_fold(records)
    rows: list[Row] = []
    for name, summary in summaries.items():
        size, hd95, inside = records.latency.get(name, {}), summary.hd95, summary.dice_search_fold
        rows.append(
            {
                "network": name,
                "split": "out-of-fold",
                "n_patients": summary.dice.n,
                "n_cases": len(summary.cases),
                "dice_mean": summary.dice.value,
                "dice_low": summary.dice.low,
                "dice_high": summary.dice.high,
                "dice_median": float(summary.cases["dice"].median()),
                "dice_search_fold": None if inside is None else inside.value,
                "n_search_fold": 0 if inside is None else inside.n,
                "hd95_median_mm": None if hd95 is None else hd95.value,
                "hd95_low_mm": None if hd95 is None else hd95.low,
                "hd95_high_mm": None if hd95 is None else hd95.high,
                "n_hd95": 0 if hd95 is None else hd95.n,
                "latency_median_ms": size.get("median_ms"),
                "latency_p95_ms": size.get("p95_ms"),
                "params_m": size.get("params_m"),
                "macs_g": size.get("macs_g"),
            }
        )
    columns = [
        text("network", "Network"),
        number("n_patients", "n"),
        number("dice_mean", "Dice", 3),
        interval("dice_low", "dice_high", 3),
        number("dice_median", "Median Dice", 3),
    ]
    if fold is not None:
        columns.append(Column(f"Fold {fold} only (n)", _show_search_fold, numeric=True))
    columns += [
        Column("HD95, mm (n)", _show_hd95, numeric=True),
        interval("hd95_low_mm", "hd95_high_mm", 1),
        number("latency_median_ms", "Latency, ms", 2),
        number("macs_g", "MACs, 10⁹", 2),
        number("params_m", "Params, 10⁶", 2),
    ]
    caption = (
        "Whole-tumour segmentation on each scan's own grid. Split: out-of-fold, by patient; n counts patients. Dice: "
        "mean over patients (a patient's cases averaged), with the percentile-bootstrap interval over patients; median "
        "over cases. HD95: median over patients where both masks hold tumour. "
    )
    if fold is not None:
        caption += f"Fold {fold} holds the only test patients that the architecture search did not see."
    return Table("segmentation", caption.strip(), columns, rows)


def _show_search_fold(row: Row) -> str | None:
    value = show_number(row["dice_search_fold"], 3)
    return None if value is None else f"{value} ({row['n_search_fold']})"


def _show_hd95(row: Row) -> str | None:
    value = show_number(row["hd95_median_mm"], 1)
    return None if value is None else f"{value} ({row['n_hd95']})"


def _paired(config: RunConfig, summaries: Mapping[str, NetworkSummary]) -> Table:
    reference = main_network(list(summaries))
    rows: list[Row] = []
    for name, summary in summaries.items():
        if name == reference:
            continue
        both = summaries[reference].cases.merge(summary.cases, on="case_id", suffixes=("", "_other"))
        differences = (both["dice"] - both["dice_other"]).tolist()
        generator = numpy_generator(config.seed, "report", "paired", name)
        gap = estimate(differences, both["patient_id"].tolist(), generator, statistic=mean)
        if gap is not None:
            better = int(np.sum(np.array(differences) > 0))
            rows.append(
                {
                    "comparison": f"{reference} − {name}",
                    "n_patients": gap.n,
                    "n_cases": len(both),
                    "difference": gap.value,
                    "low": gap.low,
                    "high": gap.high,
                    "n_better": better,
                }
            )
    columns = (
        text("comparison", "Comparison"),
        number("n_patients", "n"),
        number("difference", "Difference of Dice", 3),
        interval("low", "high", 3),
        Column("Cases better", lambda row: f"{row['n_better']} of {row['n_cases']}", numeric=True),
    )
    caption = (
        f"Dice of the {reference} minus that of each other network, on the same patients: mean over patients with the "
        "paired percentile-bootstrap interval; out-of-fold, n counts patients."
    )
    return Table("segmentation_paired", caption, columns, rows)


def device(records: RunRecords) -> str:
    """Describe the conditions of the network latencies in words."""
    environment = records.latency_conditions.get("environment", {})
    shape = records.latency_conditions.get("input_shape")
    parts = [
        str(environment.get("device", "an unrecorded device")),
        f"{environment.get('backend', '')} {environment.get('backend_version', '')}".strip(),
        str(environment.get("precision", "")),
        plural(int(environment["threads"]), "thread") if "threads" in environment else "",
        f"input {' × '.join(map(str, shape))}" if shape else "",
    ]
    return ", ".join(part for part in parts if part)


def _add_latency(section: Section, records: RunRecords) -> None:
    section.add(Subheading("Latency and size"))
    if not records.latency:
        section.add_missing("Latency of the networks")
    else:
        rows = [_latency_row(name, record) for name, record in records.latency.items()]
        columns = [
            text("network", "Network"),
            number("median_ms", "Median, ms", 2),
            number("p95_ms", "95th percentile, ms", 2),
            number("runs", "Runs", 0),
            number("warmup_runs", "Warm-up runs", 0),
            number("times_student", "Times the student", 2),
            interval("times_student_p5", "times_student_p95", 2, "5th to 95th percentile"),
            number("macs_g", "MACs, 10⁹", 2),
            number("params_m", "Params, 10⁶", 2),
        ]
        caption = (
            f"Time of one call at batch 1 on {device(records)}; networks take turns, and the ratio is taken turn by "
            "turn. MACs: multiply-accumulate operations of one call."
        )
        section.add(Table("latency", caption, columns, rows))
    if not records.parity:
        section.add_missing("Parity of the exported engines")
        return
    rows = [{"engine": name, **record} for name, record in records.parity.items()]
    columns = [
        text("engine", "Engine"),
        text("network", "Network"),
        number("fold", "Fold"),
        number("n_slices", "Slices"),
        Column("Largest logit difference", lambda row: f"{float(row['max_abs_logit_difference']):.1e}", numeric=True),
        number("mask_dice", "Dice of the masks", 5),
    ]
    caption = (
        f"Exported engines against PyTorch on real test slices ({records.parity_backend}); an engine beyond tolerance "
        "is refused and would not stand here."
    )
    section.add(Table("parity", caption, columns, rows))


def _latency_row(name: str, record: Row) -> Row:
    relative = record.get("times_student") or {}
    return {
        "network": name,
        "median_ms": record["median_ms"],
        "p95_ms": record["p95_ms"],
        "runs": record["n"],
        "warmup_runs": record.get("warmup_runs"),
        "times_student": relative.get("median"),
        "times_student_p5": relative.get("p5"),
        "times_student_p95": relative.get("p95"),
        "macs_g": record.get("macs_g"),
        "params_m": record.get("params_m"),
    }


def _add_overlays(section: Section, records: RunRecords, config: RunConfig, network: str, cases: pd.DataFrame) -> None:
    ranked = cases.sort_values(["dice", "case_id"], ascending=[False, True]).reset_index(drop=True)
    pictures = []
    for rank in spread(len(ranked), config.report.overlay_cases):
        row = ranked.iloc[rank]
        figure = _overlay(records, config, network, str(row["case_id"]), f"overlay_{rank + 1:03d}")
        if figure is not None:
            name = rank_name(rank, len(ranked))
            pictures.append(Picture(figure, f"{row['case_id']}: Dice {row['dice']:.3f}, {name}."))
    section.add(Subheading("Cases"))
    if not pictures:
        section.add_missing("Overlays of predicted masks")
        return
    caption = (
        f"Cases spread over the ranks of Dice of the {network}, best to worst (out-of-fold, "
        f"n = {plural(len(ranked), 'case')}), each in the slice with the largest expert mask. Anterior is up, the "
        "patient's right on the left."
    )
    legend = ((TRUTH_COLOUR, "expert"), (PREDICTION_COLOUR, f"{network}, dashed"))
    section.add(Figures(caption, pictures, legend))


def _overlay(records: RunRecords, config: RunConfig, network: str, case_id: str, name: str) -> Figure | None:
    case = records.cohort.cases[case_id]
    truth, predicted = case.mask(), records.predicted_mask(network, case_id)
    if truth is None or predicted is None:
        return None
    shown = config.cohort.sequences[:_MAX_PANELS]
    index = choose_slice(truth, predicted)
    images = np.asarray(case.images()[index, list(case.channels(shown))], dtype=np.float32)
    return overlay(
        name,
        images,
        [sequence if sequence in case.present else f"{sequence}, missing" for sequence in shown],
        np.asarray(truth[index]),
        predicted[index],
        aspect=case.spacing_mm[1] / case.spacing_mm[0],
        alt=f"Case {case_id}, slice {index + 1} of {case.n_slices}, outlined by the expert and by the {network}",
    )


def spread(n: int, wanted: int) -> list[int]:
    """Return ``wanted`` ranks of 0 … n - 1, evenly spread: both ends, and the median one if there are three or more.

    >>> spread(5, 3), spread(2, 6), spread(9, 1), spread(20, 4)
    ([0, 2, 4], [0, 1], [4], [0, 6, 10, 19])
    """
    if n == 0:
        return []
    if wanted == 1:
        return [n // 2]
    ranks = sorted({round(position) for position in np.linspace(0, n - 1, min(wanted, n))})
    if len(ranks) > 2:
        nearest = min(range(1, len(ranks) - 1), key=lambda place: abs(ranks[place] - n // 2))
        ranks[nearest] = n // 2
    return ranks


def rank_name(rank: int, n: int) -> str:
    """Name a rank: best, median, worst, or its number.

    >>> [rank_name(rank, 5) for rank in range(5)]
    ['best', 'rank 2 of 5', 'median', 'rank 4 of 5', 'worst']
    """
    names = {n // 2: "median", n - 1: "worst", 0: "best"}
    return names.get(rank, f"rank {rank + 1} of {n}")


def _add_failures(section: Section, network: str, cases: pd.DataFrame) -> None:
    failures = cases[cases["dice"] < FAILURE_DICE].sort_values(["dice", "case_id"])
    section.add(Subheading("Failures"))
    if failures.empty:
        section.add(
            Paragraph(f"No case of the {network} has a Dice below {FAILURE_DICE} (n = {plural(len(cases), 'case')}).")
        )
        return
    sentence = f"{len(failures)} of {plural(len(cases), 'case')} of the {network} have a Dice below {FAILURE_DICE}."
    section.add(Caution(sentence))
    rows = [{str(key): value for key, value in row.items()} for row in failures.to_dict("records")]
    columns = (
        text("case_id", "Case"),
        number("fold", "Fold"),
        number("dice", "Dice", 3),
        number("hd95_mm", "HD95, mm", 1),
        number("volume_true_ml", "Expert volume, ml", 1),
        number("volume_predicted_ml", "Predicted volume, ml", 1),
    )
    caption = f"Cases of the {network} with a Dice below {FAILURE_DICE}, out-of-fold, n = {len(failures)}."
    section.add(Table("failures", caption, columns, rows))
