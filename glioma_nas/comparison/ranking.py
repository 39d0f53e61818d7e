"""Does a supernet rank networks as training them alone does? Kendall's τ over networks drawn at random.

Every supernet of a comparison scores the same networks with its own weights (``sampled_networks`` of the one-shot
strategies); here each of them is trained alone, once, as the winners are. τ near 1 means that the supernet can be
trusted to choose.

Reference: Yu et al., Evaluating the Search Phase of Neural Architecture Search, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau

from glioma_nas.architecture import Architecture
from glioma_nas.comparison.cells import Cell, made_from
from glioma_nas.comparison.networks import ROLE, scores_on_test_patients, trained_network
from glioma_nas.config import RunConfig
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.stages.search import SAMPLED_FILE

FEWEST = 4
"""Networks below which a rank correlation says nothing."""

SCORES_FILE = "scores.json"


def rank_supernets(
    cells: Sequence[Cell], config: RunConfig, inputs: Mapping[str, Path], out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Train every network that the cells' supernets scored, and return each supernet's rank correlation.

    Networks that are trained already are taken over.

    Args:
        cells: Finished searches; those without a supernet of ours are left out.
        config: The base configuration; its seed and training are those of the networks.
        inputs: Finished folders of the preprocess and latency stages.
        out: Gets a folder for each network.
        progress: Where to report.

    Returns:
        One row a supernet: ``strategy``, ``seed``, ``n``, ``tau`` and ``p``; the latter are none where all networks
        scored alike.
    """
    inherited: list[tuple[Cell, dict[str, float]]] = []
    networks: dict[str, Architecture] = {}
    for cell in cells:
        path = cell.folder / "search" / SAMPLED_FILE
        if path.is_file():
            rows = [(Architecture.from_json(row["architecture"]), float(row["dice"])) for row in read_json(path)]
            networks.update({network.id: network for network, _ in rows})
            inherited.append((cell, {network.id: dice for network, dice in rows}))
    if not networks:
        return []
    own = config.model_copy(update={"train": config.train.model_copy(update={"kd_weight": 0.0, "baselines": ()})})
    cohort = PreparedCohort.load(inputs["preprocess"])
    alone = {}
    with progress.task("networks for the rank correlation", len(networks)) as task:
        for name, network in networks.items():
            alone[name] = _dice_alone(name, network, own, inputs, out, cohort, progress)
            task.advance(1, dice=alone[name])
    return [
        {"strategy": cell.strategy, "seed": cell.seed, **rank_correlation(scores, alone)} for cell, scores in inherited
    ]


def rank_correlation(inherited: Mapping[str, float], alone: Mapping[str, float]) -> dict[str, Any]:
    """Return Kendall's τ-b of two scores of the same networks, its p-value, and n; none where it is not defined.

    >>> rank_correlation({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, {"a": 5, "b": 6, "c": 7, "d": 8})["tau"]
    1.0
    """
    n = len(inherited)
    if n < FEWEST:
        return {"n": n, "tau": None, "p": None}
    found = kendalltau(list(inherited.values()), [alone[name] for name in inherited])
    tau, p = float(found.statistic), float(found.pvalue)
    return {"n": n, "tau": tau, "p": p} if math.isfinite(tau) else {"n": n, "tau": None, "p": None}


def _dice_alone(
    name: str,
    network: Architecture,
    config: RunConfig,
    inputs: Mapping[str, Path],
    out: Path,
    cohort: PreparedCohort,
    progress: Progress,
) -> float:
    key = sha256_text(canonical_json(config.model_dump(mode="json", exclude={"search"})))[:12]
    (cell,) = made_from(inputs, [Cell("sampled", config.seed, config, out / f"{name}-{key}")])
    scores = cell.folder / SCORES_FILE
    if not scores.is_file():
        network.save(cell.folder / "search" / f"{ROLE}.json")
        write_json(scores, scores_on_test_patients(cell, cohort, trained_network(cell, inputs, progress)))
    return float(read_json(scores)["dice"])
