"""Tables of a study's networks: Dice over patients with intervals, paired with one of them, beside latency and size.

The patient is the unit: a patient's cases are averaged, then the trainings of a seed, then the seeds, before anything
is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from glioma_nas.latency_timing import ratio
from glioma_nas.pareto import pareto_front
from glioma_nas.report.intervals import estimate, mean
from glioma_nas.seeding import numpy_generator
from glioma_nas.significance import holm


def per_patient(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean Dice by patient (rows) and network (columns): over a patient's cases, then trainings, then seeds.

    Args:
        scores: ``network``, ``patient_id``, ``seed`` (of the search), ``training`` (its number among those of that
            seed), ``dice``; cases without an expert mask are left out.
    """
    keys = ["patient_id", "network", "seed"]
    by_training = scores.dropna(subset=["dice"]).groupby([*keys, "training"], sort=True).dice.mean()
    by_seed = by_training.groupby(keys, sort=True).mean()
    return by_seed.groupby(["patient_id", "network"], sort=True).mean().unstack("network")


def networks_table(
    scores: pd.DataFrame,
    latencies: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str],
    reference: str,
    slowest: str | None = None,
    seed: int,
) -> pd.DataFrame:
    """Return one row a network, in the order of ``names``.

    ``dice`` is the mean over patients with a bootstrap interval over them; ``difference`` the mean of network minus
    reference over patients, with its interval; ``p`` Wilcoxon's signed-rank test of the same pairs and ``p_holm``
    adjusted for all networks. ``seeds`` and ``trainings`` count the searches and the trainings of each;
    ``dice_seeds_sd`` is the standard deviation over seeds of the mean over their trainings (none for one seed), and
    ``dice_trainings_sd`` that over the trainings of one seed, its variance averaged over seeds (none for one training).
    ``latency_ms`` is the median over seeds of the medians, ``times_reference`` how many times as long as the reference
    a network takes, ``speedup`` how many times as fast as ``slowest`` it is, both over rounds in which all took turns.
    ``front`` tells whether no other network is at least as accurate and as fast, and better in one.

    Args:
        scores: See `per_patient`; also ``hd95_mm``.
        latencies: What `glioma_nas.stages.export.measure_networks` returns, one for each seed.
        names: The networks.
        reference: The one that the others are compared with.
        slowest: The one whose speed is 1; none leaves ``speedup`` out.
        seed: Seed of the bootstrap.
    """
    patients = per_patient(scores)
    others = [name for name in names if name != reference]
    p_values = [paired_p_value(patients[name].to_numpy(), patients[reference].to_numpy()) for name in others]
    p_of = dict(zip(others, zip(p_values, holm(p_values), strict=True), strict=True))
    rows: list[dict[str, Any]] = []
    for name in names:
        p, p_holm = p_of.get(name, (None, None))
        timed = [latency["networks"][name] for latency in latencies]
        latency_ms = float(np.median([row["median_ms"] for row in timed]))
        row: dict[str, Any] = {
            "network": name,
            **_dice(patients, name, reference, seed=seed),
            "p": p,
            "p_holm": p_holm,
            **_over_cases(scores[scores.network == name]),
            "latency_ms": latency_ms,
            "latency_p95_ms": float(np.median([row["p95_ms"] for row in timed])),
            "speed_hz": 1000 / latency_ms,
            "times_reference": float(np.median([_ratio(latency, name, reference) for latency in latencies])),
        }
        if slowest is not None:
            row["speedup"] = float(np.median([_ratio(latency, slowest, name) for latency in latencies]))
        row["macs_g"] = float(np.median([item["macs_g"] for item in timed]))
        row["params_m"] = float(np.median([item["params_m"] for item in timed]))
        rows.append(row)
    table = pd.DataFrame(rows)
    table["front"] = table.index.isin(pareto_front(table.latency_ms, table.dice))
    return table


def _dice(patients: pd.DataFrame, name: str, reference: str, *, seed: int) -> dict[str, Any]:
    found = estimate(
        patients[name].tolist(), list(patients.index), numpy_generator(seed, "methods", name), statistic=mean
    )
    assert found is not None
    row: dict[str, Any] = {"n_patients": found.n, "dice": found.value, "dice_low": found.low, "dice_high": found.high}
    row |= dict.fromkeys(("difference", "difference_low", "difference_high"))
    if name != reference:
        pairs = (patients[name] - patients[reference]).tolist()
        apart = estimate(pairs, list(patients.index), numpy_generator(seed, "difference", name), statistic=mean)
        assert apart is not None
        row |= {"difference": apart.value, "difference_low": apart.low, "difference_high": apart.high}
    return row


def _over_cases(own: pd.DataFrame) -> dict[str, Any]:
    by_training = own.groupby(["seed", "training"]).dice.mean().unstack("training")
    n_seeds, n_trainings = by_training.shape
    return {
        "seeds": n_seeds,
        "trainings": n_trainings,
        "dice_seeds_sd": float(by_training.mean(axis=1).std(ddof=1)) if n_seeds > 1 else None,
        "dice_trainings_sd": float(np.sqrt(by_training.var(axis=1, ddof=1).mean())) if n_trainings > 1 else None,
        "hd95_mm": float(own.hd95_mm.median()) if own.hd95_mm.notna().any() else None,
    }


def _ratio(latency: Mapping[str, Any], name: str, reference: str) -> float:
    networks = latency["networks"]
    return ratio(networks[name]["times_ms"], networks[reference]["times_ms"]).median


def paired_p_value(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 when no pair differs.

    Reference:
        Wilcoxon, Biometrics Bulletin 1 (1945).
    """
    if np.allclose(first, second):
        return 1.0
    return float(wilcoxon(first, second).pvalue)
