"""Train every method on every fold and seed with one budget, time them in turns, and compare patient by patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from glioma_nas.config import RunConfig
from glioma_nas.errors import CohortError, ConfigError
from glioma_nas.files import read_json, write_text
from glioma_nas.pipeline import Pipeline
from glioma_nas.progress import Progress
from glioma_nas.report.intervals import estimate, mean
from glioma_nas.seeding import numpy_generator
from glioma_nas.segmentation_studies.methods_page import render_methods
from glioma_nas.significance import holm

STAGES = ("preprocess", "latency", "search", "train", "export", "segment")
METHODS = ("unet_thesis", "icnet", "bisenet", "nas_unet", "monai_basic_unet", "monai_unet")
REFERENCE = "student"
TABLE_FILE = "table_4_5.csv"
PATIENTS_FILE = "patients.csv"
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Published:
    """A row of the thesis' table 4-5: 263 patients of its own, its own GPU, 224×224.

    Attributes:
        dice: Dice similarity coefficient, in [0, 1].
        speed_hz: Slices per second.
    """

    dice: float
    speed_hz: float


PUBLISHED: Mapping[str, Published] = {
    "unet_thesis": Published(0.756, 91.7),
    "icnet": Published(0.888, 56.4),
    "nas_unet": Published(0.865, 82.9),
    REFERENCE: Published(0.894, 178.3),
}


def study_methods(
    config: RunConfig, out: Path, *, methods: Sequence[str], n_seeds: int, progress: Progress
) -> pd.DataFrame:
    """Run the study; finished stages are skipped, so an interrupted one continues.

    Every seed draws its own folds, searches its own architectures and trains everything anew.

    Args:
        config: The configuration; its own baselines are replaced by ``methods``.
        out: Gets a run folder for each seed, ``table_4_5.csv``, ``patients.csv`` and ``report.html``.
        methods: Registered networks to compare with.
        n_seeds: Seeds, from ``config.seed`` on.
        progress: Where to report.

    Returns:
        One row a method, as in ``table_4_5.csv``; the student first.

    Raises:
        ConfigError: A method stands twice.
        CohortError: No case has an expert mask.
    """
    if len(set(methods)) != len(methods):
        raise ConfigError(f"--methods {','.join(methods)}: give each network once")
    train = config.train.model_copy(update={"baselines": tuple(methods)})
    frames, latencies = [], []
    with progress.task("seeds", n_seeds) as task:
        for number in range(n_seeds):
            own = config.model_copy(update={"seed": config.seed + number, "train": train})
            folder = out / f"seed{own.seed}"
            Pipeline(own, folder, progress).run(STAGES)
            scores = pd.read_csv(folder / "segment" / "dice.csv", dtype={"case_id": str, "patient_id": str})
            frames.append(scores.assign(seed=own.seed))
            latencies.append(read_json(folder / "export" / "latency.json"))
            task.advance()
    scores = pd.concat(frames, ignore_index=True)
    if scores.dice.isna().all():
        raise CohortError(f"{config.cohort.sheet}: no case has an expert mask, so there is no Dice to compare")
    patients = per_patient(scores)
    table = methods_table(scores, patients, latencies, seed=config.seed)
    write_text(out / PATIENTS_FILE, patients.reset_index().to_csv(index=False))
    write_text(out / TABLE_FILE, table.to_csv(index=False))
    conditions = {"environment": latencies[0]["environment"], "input_shape": latencies[0]["input_shape"]}
    write_text(out / PAGE_FILE, render_methods(table, conditions, config, n_seeds))
    return table


def per_patient(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean Dice by patient (rows) and network (columns): over a patient's cases, then over seeds.

    Args:
        scores: ``network``, ``patient_id``, ``seed``, ``dice``; cases without an expert mask are left out.
    """
    by_seed = scores.dropna(subset=["dice"]).groupby(["patient_id", "network", "seed"], sort=True).dice.mean()
    return by_seed.groupby(["patient_id", "network"], sort=True).mean().unstack("network")


def methods_table(
    scores: pd.DataFrame, patients: pd.DataFrame, latencies: Sequence[Mapping[str, Any]], *, seed: int
) -> pd.DataFrame:
    """Return one row a method.

    ``dice`` is the mean over patients with a bootstrap interval over them, ``dice_seeds_sd`` the standard deviation
    over seeds of that mean (none for one seed), ``p_holm`` Wilcoxon's signed-rank test of the patients' Dice against
    the student's, adjusted for all methods. ``latency_ms`` is the median over seeds of the medians, ``times_student``
    how many times as long as the student a network takes, timed in the same rounds.
    """
    names = [REFERENCE, *(name for name in dict.fromkeys(scores.network) if name != REFERENCE)]
    others = [name for name in names if name != REFERENCE]
    p_values = [paired_p_value(patients[name].to_numpy(), patients[REFERENCE].to_numpy()) for name in others]
    adjusted = dict(zip(others, holm(p_values), strict=True))
    rows = []
    for name in names:
        found = estimate(
            patients[name].tolist(), list(patients.index), numpy_generator(seed, "methods", name), statistic=mean
        )
        assert found is not None
        own = scores[scores.network == name]
        by_seed = own.groupby("seed").dice.mean()
        timed = [latency["networks"][name] for latency in latencies]
        latency_ms = float(np.median([row["median_ms"] for row in timed]))
        published = PUBLISHED.get(name)
        rows.append(
            {
                "network": name,
                "n_patients": found.n,
                "seeds": len(by_seed),
                "dice": found.value,
                "dice_low": found.low,
                "dice_high": found.high,
                "dice_seeds_sd": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
                "p_holm": adjusted.get(name),
                "hd95_mm": float(own.hd95_mm.median()) if own.hd95_mm.notna().any() else None,
                "latency_ms": latency_ms,
                "speed_hz": 1000 / latency_ms,
                "times_student": float(np.median([row[f"times_{REFERENCE}"]["median"] for row in timed])),
                "macs_g": float(np.median([row["macs_g"] for row in timed])),
                "params_m": float(np.median([row["params_m"] for row in timed])),
                "source_dice": published.dice if published else None,
                "source_speed_hz": published.speed_hz if published else None,
                "source_times_student": PUBLISHED[REFERENCE].speed_hz / published.speed_hz if published else None,
            }
        )
    return pd.DataFrame(rows)


def paired_p_value(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 when no pair differs.

    Reference:
        Wilcoxon, Biometrics Bulletin 1 (1945).
    """
    if np.allclose(first, second):
        return 1.0
    return float(wilcoxon(first, second).pvalue)
