"""What every registered segmentation network must do. Subclass, name your network, and pytest runs the rest.

class TestMyNetwork(NetworkSuite):
    name = "my_network"
    options = {"width": 8}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.latency_backend import open_backend
from glioma_nas.onnx_export import export_onnx
from glioma_nas.parity import compare


class NetworkSuite:
    """Conformance tests of an entry of ``registry.networks``.

    Attributes:
        name: Its registered name.
        options: Options that make it small, so that the tests are fast.
        size_px: Side of the test images.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    size_px: ClassVar[int] = 32

    def build(self, in_channels: int = 2, n_classes: int = 2) -> nn.Module:
        """Build the network with fixed initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = registry.networks.get(self.name)(in_channels, n_classes, **self.options)
        return module

    def image(self, batch: int = 1, in_channels: int = 2) -> torch.Tensor:
        """Draw a batch (N, C, H, W), float32, standard normal."""
        return torch.randn(batch, in_channels, self.size_px, self.size_px, generator=torch.Generator().manual_seed(1))

    def test_network_has_a_description(self) -> None:
        entry = next(entry for entry in registry.networks.entries() if entry.name == self.name)
        assert entry.summary

    @pytest.mark.parametrize(("in_channels", "n_classes", "batch"), [(1, 2, 1), (2, 2, 2), (4, 3, 1)])
    def test_logits_have_the_size_of_the_image(self, in_channels: int, n_classes: int, batch: int) -> None:
        with torch.inference_mode():
            logits = self.build(in_channels, n_classes).eval()(self.image(batch, in_channels))
        assert logits.shape == (batch, n_classes, self.size_px, self.size_px)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()

    def test_slice_is_segmented_alike_alone_and_in_a_batch(self) -> None:
        network, images = self.build().eval(), self.image(batch=2)
        with torch.inference_mode():
            torch.testing.assert_close(network(images)[1:], network(images[1:]), atol=1e-4, rtol=1e-4)

    def test_every_parameter_gets_a_gradient(self) -> None:
        network = self.build().train()
        output = network(self.image(batch=2))
        maps = output if isinstance(output, Mapping) else {"logits": output}
        target = torch.zeros(2, self.size_px, self.size_px, dtype=torch.int64)
        torch.stack([nn.functional.cross_entropy(logits, target) for logits in maps.values()]).sum().backward()
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []

    def test_weights_return_from_safetensors(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        network = self.build().eval()
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
        other = registry.networks.get(self.name)(2, 2, **self.options).eval()
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        with torch.inference_mode():
            torch.testing.assert_close(other(self.image()), network(self.image()))

    def test_onnx_engine_computes_the_same_for_any_batch_size(self) -> None:
        network = self.build().eval()
        shape = (1, 2, self.size_px, self.size_px)
        model = export_onnx(network, [shape], opset=17, dynamic_batch=True)
        backend: Any = open_backend("onnxruntime")
        parity = compare(network, backend.load(model, [shape], threads=1), [self.image()[0].numpy()])
        assert parity.max_abs_logit_difference < 1e-3
        three = self.image(batch=3)
        (given,) = backend.load(model, [tuple(three.shape)], threads=1).run([three.numpy()])
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(given), network(three), atol=1e-3, rtol=1e-3)
