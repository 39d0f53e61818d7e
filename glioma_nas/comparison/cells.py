"""The searches of a comparison: which strategy, which seed, at which configuration, in which folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glioma_nas.comparison.budget import search_steps, with_budget
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.files import canonical_json, sha256_file, sha256_text
from glioma_nas.pipeline import MANIFEST


@dataclass(frozen=True)
class Cell:
    """One search of the comparison.

    Attributes:
        strategy: Registered name.
        seed: Seed of search and training.
        config: Its configuration, at the common budget.
        folder: Where it works.
    """

    strategy: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Strategy and seed."""
        return f"{self.strategy}, seed {self.seed}"


def plan(
    config: RunConfig, strategies: Sequence[str], *, n_seeds: int, trials: int, out: Path, ranked: int = 0
) -> list[Cell]:
    """Return every search of the comparison; everything that is wrong with it is found here, before hours of work.

    Args:
        config: The base configuration.
        strategies: Registered names.
        n_seeds: Searches of each.
        trials: Trials that share a multi-trial budget.
        out: Folder of the comparison.
        ranked: Networks drawn at random that every supernet scores for its rank correlation; see
            `glioma_nas.comparison.ranking`.

    Raises:
        ConfigError: A strategy stands twice, or the budget does not suffice.
        UnknownNameError: A strategy is not registered.
    """
    if len(set(strategies)) != len(strategies) or not strategies:
        raise ConfigError(f"--strategies {','.join(strategies)}: give each strategy once, at least one")
    search_steps(config)
    cells = []
    for strategy in strategies:
        for number in range(n_seeds):
            seed = config.seed + number
            own = with_budget(config, strategy, seed=seed, trials=trials, ranked=ranked)
            key = sha256_text(canonical_json(own.model_dump(mode="json")))[:12]
            cells.append(Cell(strategy, seed, own, out / strategy / f"seed{seed}-{key}"))
    return cells


def made_from(inputs: Mapping[str, Path], cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with folders that belong to these very inputs: nothing made from earlier ones is taken over.

    Args:
        inputs: Finished folders of the preprocess and latency stages; they count by their manifests.
        cells: See `plan`.
    """
    key = sha256_text(canonical_json({name: sha256_file(path / MANIFEST) for name, path in inputs.items()}))[:8]
    return [replace(cell, folder=cell.folder.with_name(f"{cell.folder.name}-{key}")) for cell in cells]
