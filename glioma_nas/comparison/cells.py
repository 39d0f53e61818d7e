"""The searches of a comparison: which strategy, which seed, at which configuration, in which folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glioma_nas.comparison.budget import epoch_seconds, search_steps, with_budget
from glioma_nas.component_checks import check_components
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
        minutes: Wall time that the search trains for; none where the budget is a number of steps.
    """

    strategy: str
    seed: int
    config: RunConfig
    folder: Path
    minutes: float | None = None

    @property
    def name(self) -> str:
        """Strategy and seed."""
        return f"{self.strategy}, seed {self.seed}"

    @property
    def epoch_s(self) -> float | None:
        """Wall time of an epoch of the search, in seconds; none where the budget is a number of steps."""
        return None if self.minutes is None else epoch_seconds(self.config, self.minutes)


def plan(
    config: RunConfig,
    strategies: Sequence[str],
    *,
    n_seeds: int,
    trials: int,
    out: Path,
    ranked: int = 0,
    minutes: float | None = None,
) -> list[Cell]:
    """Return every search of the comparison; what can be wrong with it is looked for here, before hours of work.

    Every strategy is built and shown the space: a missing package, an option it does not take or a space it cannot
    search is found now.

    Args:
        config: The base configuration.
        strategies: Registered names.
        n_seeds: Searches of each.
        trials: Trials that share a multi-trial budget.
        out: Folder of the comparison.
        ranked: Networks drawn at random that every supernet scores for its rank correlation; see
            `glioma_nas.comparison.ranking`.
        minutes: Wall time that every search trains for; none for the budget in steps.

    Raises:
        ConfigError: A strategy stands twice or cannot be built, the budget does not suffice, or training is to take
            several devices.
        PluginError: A strategy needs a package that is not installed.
        UnknownNameError: A strategy is not registered.
    """
    if len(set(strategies)) != len(strategies) or not strategies:
        raise ConfigError(f"--strategies {','.join(strategies)}: give each strategy once, at least one")
    if config.train.devices != 1:
        raise ConfigError("compare trains one network after the other on one device; set train.devices: 1")
    if minutes is None:
        search_steps(config)
    elif not minutes > 0:
        raise ConfigError(f"--minutes is {minutes:g}; give the wall time of a search, above 0")
    cells = []
    for strategy in strategies:
        for number in range(n_seeds):
            seed = config.seed + number
            own = with_budget(config, strategy, seed=seed, trials=trials, ranked=ranked, minutes=minutes)
            if number == 0:
                check_components(own, ("latency", "search", "train"))
            key = sha256_text(canonical_json(own.model_dump(mode="json")))[:12]
            cells.append(Cell(strategy, seed, own, out / strategy / f"seed{seed}-{key}", minutes))
    return cells


def made_from(inputs: Mapping[str, Path], cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with folders that belong to these very inputs: nothing made from earlier ones is taken over.

    Args:
        inputs: Finished folders of the preprocess and latency stages; they count by their manifests.
        cells: See `plan`.
    """
    key = sha256_text(canonical_json({name: sha256_file(path / MANIFEST) for name, path in inputs.items()}))[:8]
    return [replace(cell, folder=cell.folder.with_name(f"{cell.folder.name}-{key}")) for cell in cells]
