from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ConfigError, StorageError, UnknownNameError
from glioma_nas.space_building import build_space, space_options
from glioma_nas.trained_networks import build_network, load_network, network_names, weights_path


def _config(**sections: Any) -> RunConfig:
    train = {
        "baselines": ["monai_unet", "unet_thesis"],
        "baseline_options": {"monai_unet": {"channels": [4, 8]}, "unet_thesis": {"width": 2}},
    }
    preprocess = {"image_size_px": 64}
    data = {"cohort": {"sheet": "cohort.csv"}, "preprocess": preprocess, "train": train, **sections}
    return parse_config(data, source="test", folder=Path())


def test_networks_of_a_run_are_teacher_student_and_baselines() -> None:
    assert network_names(_config()) == ("teacher", "student", "monai_unet", "unet_thesis")


@pytest.mark.parametrize("baselines", [["student"], ["monai_unet", "monai_unet"]])
def test_baseline_named_twice_is_refused(baselines: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"train.baselines: '{baselines[0]}' names two networks"):
        network_names(_config(train={"baselines": baselines}))


def test_network_that_the_run_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown network 'monai_basic_unet' of this run; allowed: teacher, student"):
        build_network(_config(), tmp_path, "monai_basic_unet")


def test_baseline_gets_its_options_and_the_channels_of_the_cohort(tmp_path: Path) -> None:
    config = _config(cohort={"sheet": "cohort.csv", "sequences": ["t1", "t1ce", "flair"]})
    network = build_network(config, tmp_path, "unet_thesis")
    assert network.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16, 16)
    assert network.network.classify.in_channels == 2


def test_unknown_baseline_option_is_refused(tmp_path: Path) -> None:
    config = _config(train={"baselines": ["unet_thesis"], "baseline_options": {"unet_thesis": {"depth": 3}}})
    with pytest.raises(ConfigError, match=r"train\.baseline_options of 'unet_thesis': unknown option 'depth'"):
        build_network(config, tmp_path, "unet_thesis")


def test_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown network 'unet_thesi': did you mean 'unet_thesis'"):
        build_network(_config(train={"baselines": ["unet_thesi"]}), tmp_path, "unet_thesi")


def test_trained_weights_return_in_evaluation_mode(tmp_path: Path) -> None:
    config = _config()
    trained = build_network(config, tmp_path, "monai_unet").eval()
    path = weights_path(tmp_path, 1, "monai_unet")
    path.parent.mkdir(parents=True)
    save_file(trained.state_dict(), path)
    state = torch.random.get_rng_state()
    loaded = load_network(config, tmp_path, tmp_path, 1, "monai_unet")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    image = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(image), trained(image))


def test_missing_damaged_or_foreign_weights_are_refused_with_their_path(tmp_path: Path) -> None:
    config = _config()
    path = weights_path(tmp_path, 0, "monai_unet")
    with pytest.raises(StorageError, match=r"fold0/monai_unet/weights\.safetensors: no such file; run the train stage"):
        load_network(config, tmp_path, tmp_path, 0, "monai_unet")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x10\x00\x00")
    with pytest.raises(StorageError, match=r"weights\.safetensors: not readable as weights"):
        load_network(config, tmp_path, tmp_path, 0, "monai_unet")
    save_file(build_network(config, tmp_path, "unet_thesis").state_dict(), path)
    with pytest.raises(StorageError, match=r"weights\.safetensors: weights of another network than 'monai_unet'"):
        load_network(config, tmp_path, tmp_path, 0, "monai_unet")


def test_space_options_come_from_the_data() -> None:
    config = _config(search={"space_options": {"preset": "tiny"}})
    assert space_options(config) == {"preset": "tiny", "in_channels": 2, "n_classes": 2, "image_size_px": 64}


@pytest.mark.parametrize("name", ["in_channels", "n_classes", "image_size_px"])
def test_space_option_that_the_data_decide_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"search\.space_options\.{name} is decided by .*; remove it"):
        space_options(_config(search={"space_options": {name: 2}}))


def test_unknown_space_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.space_options of 'nasbranet': unknown option 'widhts'"):
        build_space(_config(search={"space_options": {"widhts": [16]}}))


def test_architecture_that_is_missing_is_refused(tmp_path: Path) -> None:
    config = _config(search={"space_options": {"preset": "tiny"}})
    with pytest.raises(StorageError, match=r"student\.json: no such file"):
        build_network(config, tmp_path, "student")
