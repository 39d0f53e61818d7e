"""Write every network as an ONNX engine, prove that it computes what PyTorch does, and time all of them side by side.

RUN/export holds ``engines/<network>.onnx`` (weights of fold 0), ``engines/student_fold<k>.onnx`` for the other folds,
the student in the other formats that are asked for, ``parity.json``, ``latency.json``, ``latency.csv``,
``MODEL_CARD.md`` and ``bundle/``, the student as a MONAI bundle.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig
from glioma_nas.engine_scores import expert_dice
from glioma_nas.export_formats import ExportRequest, export_file, is_reduced, judge
from glioma_nas.files import sha256_file, write_bytes, write_json, write_text
from glioma_nas.latency_backend import Array, Engine, open_backend, open_onnx_backend
from glioma_nas.latency_records import Environment
from glioma_nas.latency_timing import ratio, time_in_turns
from glioma_nas.model_card import CardFacts, model_card
from glioma_nas.monai_bundle import write_bundle
from glioma_nas.network_size import network_size
from glioma_nas.onnx_export import export_onnx, simplify_onnx
from glioma_nas.parity import Parity, compare
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.trained_networks import load_network, network_names

ENGINES_FOLDER = "engines"
PARITY_FILE = "parity.json"
LATENCY_FILE = "latency.json"
LATENCY_TABLE_FILE = "latency.csv"
CARD_FILE = "MODEL_CARD.md"
BUNDLE_FOLDER = "bundle"
PARITY_BACKEND = "onnxruntime"
TIMED_FOLD = 0
_REFERENCE = "student"


def run(context: StageContext) -> dict[str, Any]:
    """Export, compare, time.

    Returns:
        Parity of every engine, latency and size of every network, the environment.

    Raises:
        BackendError: An engine is missing, refuses a network, or computes something else than PyTorch.
    """
    config = context.config
    cohort = PreparedCohort.load(context.inputs["preprocess"])
    names = network_names(config)
    engines = {f"{name}.onnx": (name, TIMED_FOLD) for name in names}
    engines |= {f"student_fold{fold}.onnx": ("student", fold) for fold in range(cohort.folds.n) if fold != TIMED_FOLD}

    parity: dict[str, dict[str, Any]] = {}
    timed: dict[str, nn.Module] = {}
    with context.progress.task("exporting engines", len(engines)) as task:
        for file, (name, fold) in engines.items():
            network = load_network(config, context.inputs["search"], context.inputs["train"], fold, name)
            images = parity_slices(
                cohort.select(cohort.folds.test(fold)), config.cohort.channels, config.export.parity_slices
            )
            path = context.folder / ENGINES_FOLDER / file
            found = export_engine(network, images, path, config)
            parity[file] = _parity_row(name, fold, path, found)
            if fold == TIMED_FOLD:
                timed[name] = network
            task.advance()
    not_compared = _deliver_student(context, cohort, timed[_REFERENCE], parity)
    tolerance = {
        "max_abs_logit_difference": config.export.max_abs_logit_difference,
        "min_mask_dice": config.export.min_mask_dice,
        "min_reduced_mask_dice": config.export.min_reduced_mask_dice,
    }
    write_json(
        context.folder / PARITY_FILE,
        {"backend": PARITY_BACKEND, "tolerance": tolerance, "engines": parity, "not_compared": not_compared},
    )
    latency = measure_networks(timed, config, context.progress)
    _describe_student(context, cohort, timed[_REFERENCE], latency, parity, not_compared)
    write_json(context.folder / LATENCY_FILE, latency)
    write_text(context.folder / LATENCY_TABLE_FILE, latency_csv(latency))
    for name, row in latency["networks"].items():
        context.progress.note(
            f"export: {name} {row['median_ms']:.2f} ms (p95 {row['p95_ms']:.2f}, n {row['n']}), "
            f"{row['params_m']:.3f} M parameters, {row['macs_g']:.3f} GMAC"
        )
    # The single times stay in the file: a manifest is for reading.
    shown = {name: {k: v for k, v in row.items() if k != "times_ms"} for name, row in latency["networks"].items()}
    return {"parity": parity, "not_compared": not_compared, "latency": {**latency, "networks": shown}}


def _deliver_student(
    context: StageContext, cohort: PreparedCohort, network: nn.Module, parity: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Write the student of the timed fold in the further formats; fill ``parity``, return what was not compared."""
    config = context.config
    train, test = (cohort.select(fold) for fold in (cohort.folds.train(TIMED_FOLD), cohort.folds.test(TIMED_FOLD)))
    request = ExportRequest(
        network,
        _shape(config),
        config.export.opset,
        config.latency.threads,
        np.stack(parity_slices(train, config.cohort.channels, config.export.calibration_slices)),
        config.export.gpus,
    )
    images = parity_slices(test, config.cohort.channels, config.export.parity_slices)
    kinds = dict.fromkeys([*config.export.formats, *(["torch_export"] if config.export.bundle else [])])
    not_compared: dict[str, str] = {}
    for kind in kinds:
        if kind == "onnx":
            continue  # written for every network
        exported = export_file(request, kind, context.folder / ENGINES_FOLDER / _REFERENCE)
        name = exported.path.name
        found = judge(network, exported, images, config.export, reduced=is_reduced(kind))
        if exported.engine is None or isinstance(found, str):
            not_compared[name] = str(found)
            continue
        parity[name] = _parity_row(_REFERENCE, TIMED_FOLD, exported.path, found)
        if is_reduced(kind) and any(case.native_mask() is not None for case in test):
            parity[name] |= _cost_of_fewer_bits(network, exported.engine, test, config)
    return not_compared


def _cost_of_fewer_bits(
    network: nn.Module, engine: Engine, cases: Sequence[PreparedCase], config: RunConfig
) -> dict[str, Any]:
    """Return the mean Dice with the experts' masks that PyTorch reaches in float32, and the engine."""
    exact = open_backend("torch").prepare(network, [_shape(config)], threads=config.latency.threads)
    found = [expert_dice(each, cases, config.cohort.channels) for each in (exact, engine)]
    return {
        "expert_dice_float32": _rounded(float(np.mean(found[0]))),
        "expert_dice": _rounded(float(np.mean(found[1]))),
        "n_cases": len(found[0]),
    }


def _describe_student(
    context: StageContext,
    cohort: PreparedCohort,
    network: nn.Module,
    latency: dict[str, Any],
    parity: dict[str, dict[str, Any]],
    not_compared: dict[str, str],
) -> None:
    config, row = context.config, latency["networks"][_REFERENCE]
    own = {
        name: found for name, found in parity.items() if (found["network"], found["fold"]) == (_REFERENCE, TIMED_FOLD)
    }
    architecture = Architecture.load(context.inputs["search"] / f"{_REFERENCE}.json")
    card = model_card(
        CardFacts(
            network=_REFERENCE,
            architecture=architecture.id,
            sequences=config.cohort.channels,
            image_size_px=config.preprocess.image_size_px,
            n_train=len({cohort.cases[name].patient_id for name in cohort.folds.train(TIMED_FOLD)}),
            n_folds=cohort.folds.n,
            params_m=row["params_m"],
            macs_g=row["macs_g"],
            latency={**row, "conditions": Environment(**latency["environment"]).describe()},
            files={**own, **{name: {"not_compared": reason} for name, reason in not_compared.items()}},
        )
    )
    write_text(context.folder / CARD_FILE, card)
    if config.export.bundle:
        write_bundle(
            context.folder / BUNDLE_FOLDER,
            program=context.folder / ENGINES_FOLDER / f"{_REFERENCE}.pt2",
            weights=network.state_dict(),
            card=card,
            name=f"{_REFERENCE} of glioma_nas",
            sequences=config.cohort.channels,
            image_size_px=config.preprocess.image_size_px,
            architecture=architecture.to_json(),
        )


def _parity_row(name: str, fold: int, path: Path, found: Parity) -> dict[str, Any]:
    return {
        "network": name,
        "fold": fold,
        "sha256": sha256_file(path),
        **{key: _rounded(value) for key, value in dataclasses.asdict(found).items()},
    }


def export_engine(network: nn.Module, images: Sequence[Array], path: Path, config: RunConfig) -> Parity:
    """Write ``network`` to ``path`` as ONNX with an open batch size, unless its engine is refused.

    Args:
        network: In evaluation mode, on the CPU.
        images: Slices to compare on, each float32 (C, H, W).
        path: The ``.onnx`` file.
        config: The run's configuration.

    Raises:
        BackendError: See `glioma_nas.parity.Parity.require`; nothing is written then.
    """
    shape = _shape(config)
    model = simplify_onnx(export_onnx(network, [shape], opset=config.export.opset, dynamic_batch=True))
    backend = open_onnx_backend(PARITY_BACKEND)
    parity = compare(network, backend.load(model, [shape], threads=config.latency.threads), images)
    parity.require(config.export, engine=path.name)
    write_bytes(path, model)
    return parity


def parity_slices(cases: Sequence[PreparedCase], sequences: Sequence[str], n: int) -> list[Array]:
    """Choose up to ``n`` slices, spread evenly: those with tumour first, since masks without tumour agree trivially.

    Returns:
        Slices float32 (C, H, W), channels in the order of ``sequences``.
    """
    places = [(case, index) for case in cases for index in range(case.n_slices) if case.brain_px[index] > 0]
    tumour = [(case, index) for case, index in places if index in case.tumour_slices]
    other = [(case, index) for case, index in places if index not in case.tumour_slices]
    chosen = [*_spread(tumour, n), *_spread(other, max(n - len(tumour), 0))]
    return [np.ascontiguousarray(case.images()[index, list(case.channels(tuple(sequences)))]) for case, index in chosen]


def measure_networks(
    networks: dict[str, nn.Module], config: RunConfig, progress: Progress, *, reference: str = _REFERENCE
) -> dict[str, Any]:
    """Time all networks on the configured engine, made for exactly batch 1, one call each a round; count their size.

    Rounds go on until every median stands still or ``latency.max_runs`` are done.

    Returns:
        Environment, input shape, and for each network median with its interval, p95, n, the share of disturbed calls,
        the clock, every single time that counts, parameters (millions), MACs (10⁹) and its time relative to that of
        ``reference``, round by round.

    Raises:
        BackendError: The engine is missing or refuses a network.
    """
    options = config.latency
    shape = _shape(config)
    backend = open_backend(options.backend, options.precision)
    engines = {name: backend.prepare(network, [shape], threads=options.threads) for name, network in networks.items()}
    warmup_runs = max(options.warmup_runs, 1)
    taken = time_in_turns(
        engines,
        warmup_runs=warmup_runs,
        runs=options.network_runs,
        max_runs=options.max_runs,
        progress=progress,
        description="timing networks",
    )
    clock_mhz = backend.clock_mhz()
    rows = {}
    for name, network in networks.items():
        record = taken[name].record(warmup_runs=warmup_runs, input_shapes=[shape], clock_mhz=clock_mhz)
        size = network_size(network, shape)
        relative = ratio(taken[name].times_ms, taken[reference].times_ms)
        rows[name] = {
            "median_ms": round(record.median_ms, 4),
            "p95_ms": round(record.p95_ms, 4),
            "n": record.n,
            "warmup_runs": record.warmup_runs,
            "median_low_ms": record.median_low_ms and round(record.median_low_ms, 4),
            "median_high_ms": record.median_high_ms and round(record.median_high_ms, 4),
            "disturbed": record.disturbed and round(record.disturbed, 4),
            "clock_mhz": record.clock_mhz,
            "params_m": round(size.params_m, 6),
            "macs_g": round(size.macs_g, 6),
            f"times_{reference}": {key: round(value, 4) for key, value in dataclasses.asdict(relative).items()},
            "times_ms": [round(time, 4) for time in taken[name].times_ms],
        }
    return {
        "environment": dataclasses.asdict(backend.environment(threads=options.threads)),
        "input_shape": list(shape),
        "fold": TIMED_FOLD,
        "networks": rows,
    }


def latency_csv(latency: dict[str, Any]) -> str:
    """Render what `measure_networks` returns as CSV: one row a network, with all conditions in it."""
    environment = latency["environment"]
    times = ("median_ms", "p95_ms", "n", "warmup_runs", "median_low_ms", "median_high_ms", "disturbed", "clock_mhz")
    columns = (*times, "params_m", "macs_g")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", *columns, f"times_{_REFERENCE}", "input_shape", *environment])
    shape = "x".join(str(size) for size in latency["input_shape"])
    for name, row in latency["networks"].items():
        relative = row[f"times_{_REFERENCE}"]["median"]
        writer.writerow([name, *(row[column] for column in columns), relative, shape, *environment.values()])
    return text.getvalue()


def _shape(config: RunConfig) -> tuple[int, int, int, int]:
    side = config.preprocess.image_size_px
    return (1, len(config.cohort.channels), side, side)


def _spread(places: Sequence[tuple[PreparedCase, int]], n: int) -> list[tuple[PreparedCase, int]]:
    if len(places) <= n:
        return list(places)
    return [places[int(position)] for position in np.linspace(0, len(places) - 1, n).round()]


def _rounded(value: float | int) -> float | int:
    return float(f"{value:.6g}") if isinstance(value, float) else value
