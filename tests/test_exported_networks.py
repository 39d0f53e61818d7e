"""A derived network, once exported, needs neither NNI nor this project; before that it is an ordinary module."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from supernets import random_sample
from torch import nn

from glioma_nas.onnx_export import export_onnx
from glioma_nas.search_spaces.derived_network import DerivedNetwork
from glioma_nas.search_spaces.nasbranet import NASBraNet

IMAGE = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))

RUN_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nni", "glioma_nas", "search_spaces"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
import numpy as np

folder = sys.argv[1]
image = np.load(folder + "/image.npy")
if sys.argv[2] == "pt2":
    import torch
    with torch.no_grad():
        logits = torch.export.load(folder + "/network.pt2").module()(torch.from_numpy(image)).numpy()
else:
    import onnxruntime
    (logits,) = onnxruntime.InferenceSession(folder + "/network.onnx").run(None, {"image": image})
assert not [name for name in sys.modules if name.split(".")[0] in ("nni", "glioma_nas")]
np.save(folder + "/logits.npy", logits)
"""


def trained(seed: int, **options: Any) -> DerivedNetwork:
    torch.manual_seed(seed)
    space = NASBraNet("tiny", **options)
    network = space.freeze(random_sample(space, seed))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_exported_network_runs_where_nni_and_this_project_are_missing(form: str, tmp_path: Path) -> None:
    network = trained(2)
    if form == "pt2":
        torch.export.save(torch.export.export(network, (IMAGE,)), tmp_path / "network.pt2")
    else:
        (tmp_path / "network.onnx").write_bytes(export_onnx(network, [tuple(IMAGE.shape)], opset=17))
    np.save(tmp_path / "image.npy", IMAGE.numpy())
    subprocess.run(
        [sys.executable, "-c", RUN_ALONE, str(tmp_path), form],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    with torch.no_grad():
        expected = network(IMAGE).numpy()
    assert expected.std(axis=(0, 2, 3)).min() > 1e-3
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


@pytest.mark.slow
def test_compiled_network_gives_the_same_logits() -> None:
    # Compiling takes a while for every operator, so the smallest network there is.
    network = trained(1, scales=(2, 4), n_layers=3, n_branches=1, operators=("zoomed_conv",))
    compiled = torch.compile(network)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGE), network(IMAGE), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_network_trains() -> None:
    network = trained(1, scales=(2, 4), n_layers=3).train()
    plain = copy.deepcopy(network)
    for module in (torch.compile(network, backend="aot_eager"), plain):
        sum(logits.square().mean() for logits in module(IMAGE.repeat(2, 1, 1, 1)).values()).backward()
    for (name, own), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("operators", [("skip", "grouped_conv", "mbconv"), ("depthwise_separable", "dilated_conv")])
def test_network_of_extra_operators_keeps_its_logits_through_copies(operators: tuple[str, ...]) -> None:
    network = trained(3, operators=operators)
    copied = copy.deepcopy(network)
    copied.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(copied(IMAGE), network(IMAGE))
