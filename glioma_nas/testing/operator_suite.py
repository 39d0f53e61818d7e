"""What every operator of a cell must do. Subclass, name your operator, and pytest runs the rest.

class TestMyOperator(OperatorSuite):
    name = "my_operator"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
import pytest
import torch
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy, no_default_hook
from nni.nas.space import model_context
from torch import Tensor, nn

from glioma_nas import registry
from glioma_nas.latency_backend import open_backend
from glioma_nas.onnx_export import export_onnx
from glioma_nas.parity import compare
from glioma_nas.relaxation import Relaxation, RelaxationSlot, relaxation_hooks

_CELL, _SCALE = "s2_l2", 2
_WIDTHS = (2, 4)
_SIDE_PX = 32


class _Probe(OneShotStrategy):
    """Turns a space into a supernet and leaves the choices of each pass to the test."""

    architectures = ("student", "teacher")

    def __init__(self) -> None:
        super().__init__()
        self.relaxation_slot = RelaxationSlot()

    def default_mutation_hooks(self) -> list[Any]:
        return [*relaxation_hooks(self.relaxation_slot), no_default_hook]


class OperatorSuite:
    """Conformance tests of an entry of ``registry.operators``.

    Attributes:
        name: Its registered name.
    """

    name: ClassVar[str]

    def build(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build the operator of plain layers, all weights and statistics random."""
        with torch.random.fork_rng(devices=[]), model_context({}):
            torch.manual_seed(0)
            module: nn.Module = registry.operators.get(self.name)(in_channels, out_channels, stride)
            _randomise_norms(module)
        return module

    @contextmanager
    def supernet(self, incoming: int, outgoing: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield a supernet of this operator alone and the sample that is active: widths of cell s2_l2's two ends.

        The cell's convolutions are super-kernels of the largest width (4) sliced to the widths given.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            space = registry.search_spaces.get("nasbranet")(
                "tiny", operators=(self.name,), skip_policy="conv", widths=_WIDTHS, image_size_px=_SIDE_PX
            )
            probe = _Probe()
            probe.mutate_model(space)
            _randomise_norms(space)
        layout = space.layout
        sample = {
            label: [1] if label.startswith("in_") else incoming if label.startswith("width") else values[0]
            for label, values in layout.choices.items()
        }
        # The branch 2 keeps its scale; 4 goes down behind the cell, so that both of its outputs are in the network.
        sample |= {"branches": "2_4", "width_ends": _WIDTHS[0], "in_s4_l3": [0]}
        sample |= {"width_s2_l3": outgoing, "width_s4_l3": outgoing}
        weights: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for label, allowed in layout.choices.items():
            if label.startswith("width"):
                values[label] = sample[label]
            else:
                chosen: Any = sample[label]
                chosen = chosen[0] if label.startswith("in_") else chosen
                weights[label] = torch.tensor([float(value == chosen) for value in allowed])
        with probe.relaxation_slot.using(Relaxation("student", weights, values)):
            yield space, sample

    @staticmethod
    def image(channels: int, batch: int = 2, side: int = 16) -> Tensor:
        """Draw features (N, C, H, W), float32, standard normal."""
        return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))

    def test_operator_has_a_description(self) -> None:
        entry = next(entry for entry in registry.operators.entries() if entry.name == self.name)
        assert entry.summary

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (4, 12), (12, 4)])
    def test_output_has_its_channels_and_size(self, in_channels: int, out_channels: int, stride: int) -> None:
        x = torch.randn(2, in_channels, 16, 24)
        output = self.build(in_channels, out_channels, stride).eval()(x)
        assert output.shape == (2, out_channels, 16 // stride, 24 // stride)
        assert output.dtype == torch.float32
        assert torch.isfinite(output).all()

    def test_it_is_made_of_plain_layers_outside_a_search(self) -> None:
        assert not [m for m in self.build(4, 4, 1).modules() if type(m).__module__.startswith("nni.")]

    @pytest.mark.parametrize("stride", [1, 2])
    def test_its_input_is_left_as_it_was(self, stride: int) -> None:
        # The candidates of a cell all read the same tensor.
        x = self.image(8)
        before = x.clone()
        self.build(8, 8, stride).train()(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_gradient_reaches_every_parameter_and_the_input(self, stride: int) -> None:
        module, x = self.build(8, 8, stride).train(), self.image(8).requires_grad_()
        module(x).square().mean().backward()
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
        assert x.grad is not None and bool(x.grad.any())

    @pytest.mark.parametrize("incoming", _WIDTHS)
    @pytest.mark.parametrize("outgoing", _WIDTHS)
    def test_super_kernel_equals_a_small_operator_with_the_sliced_weights(self, incoming: int, outgoing: int) -> None:
        x = self.image(incoming * _SCALE)
        with self.supernet(incoming, outgoing) as (space, sample), torch.no_grad():
            network = space.derive(sample, inherit="student").eval()
            cell = space.cells[_CELL].eval()
            for output, name in ((cell.keep, f"{_CELL}_keep"), (cell.down, f"{_CELL}_down")):
                small = network.cells[name]
                self.check_slices(output[self.name], small)
                expected = small(x)
                assert float(expected.std()) > 1e-3, "a constant proves nothing"
                torch.testing.assert_close(output(x), expected)

    @staticmethod
    def check_slices(wide: nn.Module, small: nn.Module) -> None:
        """Compare each small convolution's weight with the part of the wide one that it should be."""
        for name, conv in small.named_modules():
            if isinstance(conv, nn.Conv2d):
                full: Any = wide.get_submodule(name).weight
                rows, columns = conv.weight.shape[:2]
                fixed_groups = conv.groups if conv.groups not in (1, conv.in_channels) else 1
                grouped = full.unflatten(0, (fixed_groups, -1))[:, : rows // fixed_groups, :columns]
                assert torch.equal(conv.weight, grouped.flatten(0, 1)), name

    def test_statistics_of_a_width_are_its_own(self) -> None:
        with self.supernet(_WIDTHS[0], _WIDTHS[0]) as (space, _), torch.no_grad():
            operator = space.cells[_CELL].keep[self.name].train()
            before = {name: value.clone() for name, value in operator.state_dict().items() if "running" in name}
            operator(self.image(_WIDTHS[0] * _SCALE) + 3)
            changed = {name for name, value in before.items() if not torch.equal(operator.state_dict()[name], value)}
            narrow, wide = _statistics_by_width(operator, before)
            assert changed == narrow
            assert wide, "the operator has no statistics of the other width"

    def test_onnx_engine_computes_the_same(self) -> None:
        backend: Any = open_backend("onnxruntime")
        for stride in (1, 2):
            module, shape = self.build(8, 4, stride).eval(), (1, 8, 16, 16)
            engine = backend.load(export_onnx(module, [shape], opset=17), [shape], threads=1)
            parity = compare(module, engine, [self.image(8)[0].numpy()])
            assert parity.max_abs_logit_difference < 1e-4

    def test_it_can_be_exported_by_torch(self) -> None:
        module, x = self.build(8, 8, 1).eval(), self.image(8)
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def _randomise_norms(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.5)
            assert part.running_mean is not None and part.running_var is not None
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.2, 0.6)


def _statistics_by_width(operator: nn.Module, names: Any) -> tuple[set[str], set[str]]:
    # A layer keeps one set for each width it can have; the narrowest is the one that ran.
    sizes: dict[str, set[int]] = {}
    state = operator.state_dict()
    layer_of = {name: name.rsplit(".", 2)[0] for name in names}
    for name in names:
        sizes.setdefault(layer_of[name], set()).add(state[name].numel())
    narrow = {name for name in names if state[name].numel() == min(sizes[layer_of[name]])}
    return narrow, set(names) - narrow
