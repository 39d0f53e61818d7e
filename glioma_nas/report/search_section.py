"""The search: its curves, the derived teacher and student, and how they were chosen; then the training from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glioma_nas.config import RunConfig
from glioma_nas.report.charts import search_charts, training_charts
from glioma_nas.report.document import (
    Column,
    Facts,
    Figures,
    Paragraph,
    Picture,
    Section,
    Subheading,
    Table,
    number,
    plural,
    show_number,
    text,
)
from glioma_nas.report.figures import drawing_figure
from glioma_nas.report.records import NETWORKS_OF_SEARCH, RunRecords


def build_search(records: RunRecords, config: RunConfig) -> Section:
    """Describe the search and what it found."""
    section = Section("search", "Architecture search")
    results = records.manifests.get("search", {}).get("results", {})
    search = config.search
    section.add(
        Facts(
            (
                ("Search space", search.space),
                ("Strategy", search.strategy),
                ("Epochs", f"{search.pretrain_epochs} pretraining, {search.search_epochs} search"),
                ("Latency weight λ", f"{search.latency_weight:g} per ms"),
                ("Cases searched on", _searched_on(results)),
                ("Branches of the student", _branches(records, "student") or "not measured"),
            )
        )
    )
    for note in results.get("strategy_notes", []):
        section.add(Paragraph(f"Note: {note}."))
    if records.search_history is None:
        section.add_missing("Curves of the search")
    else:
        charts = search_charts(records.search_history)
        caption = f"Course of the search, {plural(len(records.search_history), 'epoch')}, one seed ({config.seed})."
        section.add(Figures(caption, [Picture(chart) for chart in charts]))
    for name in NETWORKS_OF_SEARCH:
        _add_derived(section, records, name, results.get(name, {}))
    return section


def build_training(records: RunRecords, config: RunConfig, colours: Mapping[str, str]) -> Section:
    """Show how teacher, student and baselines learned."""
    section = Section("training", "Training from scratch")
    train = config.train
    section.add(
        Facts(
            (
                ("Epochs", str(train.epochs)),
                ("Steps an epoch", "every slice once" if train.steps_per_epoch is None else str(train.steps_per_epoch)),
                ("Batch size", str(train.batch_size)),
                ("Loss", train.loss),
                ("Distillation weight", f"{train.kd_weight:g} (student only)"),
                ("Baselines", ", ".join(train.baselines) or "none"),
            )
        )
    )
    if not records.train_histories:
        section.add_missing("Training curves")
        return section
    charts = training_charts(records.train_histories, colours)
    folds = len({fold for _, fold in records.train_histories})
    caption = (
        f"Training of each network: mean over {plural(folds, 'fold')} thick, single folds thin. "
        "Every network has the same folds, epochs and optimiser."
    )
    section.add(Figures(caption, [Picture(chart) for chart in charts]))
    return section


def _add_derived(section: Section, records: RunRecords, name: str, results: Mapping[str, Any]) -> None:
    derived = records.derived[name]
    section.add(Subheading(name.capitalize()))
    if derived.architecture is None:
        section.add_missing(f"Derived {name}")
        return
    identity = str(derived.architecture.get("id", ""))
    latency = show_number(results.get("table_latency_ms"), 2)
    sentence = f"Architecture {identity}, branches {_branches(records, name) or 'not recorded'}"
    section.add(Paragraph(sentence + (f"; {latency} ms summed from the latency table." if latency else ".")))
    if derived.drawing is None:
        section.add_missing(f"Drawing of the {name}")
    else:
        alt = f"The cells of the {name} by layer and scale"
        figure = drawing_figure(f"architecture_{name}", derived.drawing, alt)
        section.add(Figures(f"The derived {name}: cells by layer and scale.", [Picture(figure)]))
    if derived.cells:
        caption = f"Cells of the {name}, n = {len(derived.cells)}."
        section.add(generic_table(f"cells_{name}", caption, derived.cells))
    candidates = results.get("candidates") or []
    if candidates:
        caption = (
            f"Candidates for the {name}, scored with the weights of the supernet (n, interval: not measured); the "
            "highest target was chosen."
        )
        section.add(generic_table(f"candidates_{name}", caption, candidates))


def generic_table(name: str, caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of rows whose keys this report does not know beforehand."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    flat = [{key: _plain(value) for key, value in row.items()} for row in rows]
    return Table(name, caption, [_column(key, [row.get(key) for row in flat]) for key in keys], flat)


def _column(key: str, values: Sequence[Any]) -> Column:
    heading = key.replace("_", " ").capitalize()
    filled = [value for value in values if value is not None]
    if filled and all(isinstance(value, int) and not isinstance(value, bool) for value in filled):
        return number(key, heading)
    if filled and all(isinstance(value, int | float) and not isinstance(value, bool) for value in filled):
        return number(key, heading, 3)
    if filled and all(isinstance(value, bool) for value in filled):
        return Column(heading, lambda row: "–" if row.get(key) is None else "yes" if row[key] else "no")
    # Here an empty cell is an answer (such as: no second input), not a missing measurement.
    shown = text(key, heading)
    return Column(heading, lambda row: shown.show(row) or "–")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return value


def _branches(records: RunRecords, name: str) -> str | None:
    architecture = records.derived[name].architecture
    branches = (architecture or {}).get("choices", {}).get("branches")
    if branches is None:
        return None
    scales = branches.split("_") if isinstance(branches, str) else [str(scale) for scale in branches]
    return "scales " + " and ".join(scales)


def _searched_on(results: Mapping[str, Any]) -> str:
    count, fold = results.get("n_search_patients"), results.get("search_fold")
    if count is None or fold is None:
        return "not recorded"
    return f"{count}, the training part of fold {fold}"
