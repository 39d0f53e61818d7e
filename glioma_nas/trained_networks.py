"""Rebuild the networks of a run from its folders: teacher, student and baselines, with or without trained weights.

Weights are safetensors files, ``fold<k>/<network>/weights.safetensors`` in the train folder; architectures are JSON
records, ``teacher.json`` and ``student.json`` in the search folder. Nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError, StorageError
from glioma_nas.files import atomic_path
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.space_building import N_CLASSES, build_space, construct

SEARCHED = ("teacher", "student")
WEIGHTS_FILE = "weights.safetensors"


def network_names(config: RunConfig) -> tuple[str, ...]:
    """Return the networks of a run: teacher, student, then the configured baselines.

    Raises:
        ConfigError: A baseline is called teacher or student, or stands twice.
    """
    names = (*SEARCHED, *config.train.baselines)
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(
            f"train.baselines: '{doubles[0]}' names two networks; give each baseline once, none teacher or student"
        )
    return names


def build_network(config: RunConfig, search_folder: Path, name: str) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    Args:
        config: The run's configuration.
        search_folder: Folder of the finished search stage.
        name: One of `network_names`.

    Returns:
        A module that takes float32 images (N, C, H, W) and gives logits (N, K, H, W); in training mode a searched
        network gives a dict that holds them under ``logits``.

    Raises:
        ConfigError: The run has no such network, or a baseline option is unknown.
        StorageError: The architecture record is missing.
    """
    if name not in network_names(config):
        raise ConfigError(f"unknown network '{name}' of this run; allowed: {', '.join(network_names(config))}")
    network: nn.Module
    if name in SEARCHED:
        network = build_space(config).derive(Architecture.load(search_folder / f"{name}.json"))
    else:
        network = construct(
            registry.networks.get(name),
            config.train.baseline_options.get(name, {}),
            where=f"train.baseline_options of '{name}'",
            in_channels=len(config.cohort.channels),
            n_classes=N_CLASSES,
        )
    return network


def load_network(config: RunConfig, search_folder: Path, train_folder: Path, fold: int, name: str) -> nn.Module:
    """Build a network with the weights trained for ``fold``, on the CPU in evaluation mode.

    Raises:
        StorageError: The weights are missing, damaged, or of another network.
        ConfigError: See `build_network`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # Initial weights are drawn only to be overwritten; nobody else's random stream should notice.
    with isolated_torch_rng(config.seed, "load network"):
        network = build_network(config, search_folder, name)
    path = weights_path(train_folder, fold, name)
    if not path.is_file():
        raise StorageError(f"{path}: no such file; run the train stage again")
    try:
        network.load_state_dict(load_file(path))
    except SafetensorError as err:
        raise StorageError(f"{path}: not readable as weights ({err}); delete it and run the train stage again") from err
    except RuntimeError as err:
        problem = " ".join(str(err).split())
        raise StorageError(
            f"{path}: weights of another network than '{name}' ({problem[:200]}); run the train stage again"
        ) from err
    return network.eval()


def weights_path(train_folder: Path, fold: int, name: str) -> Path:
    """Return where the weights of ``name`` trained for ``fold`` lie."""
    return train_folder / f"fold{fold}" / name / WEIGHTS_FILE


def save_weights(network: nn.Module, file: Path) -> None:
    """Write a network's weights and buffers as a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with atomic_path(file) as temporary:
        save_file(state, temporary)
