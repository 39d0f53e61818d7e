from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from supernets import random_sample
from torch import nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.derived_network import DerivedNetwork
from glioma_nas.search_spaces.layout import Cell
from glioma_nas.search_spaces.nasbranet import NASBraNet

IMAGE = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(1))


def sample_of(space: NASBraNet, *, downs: dict[int, int], operator: str = "conv3x3", **choices: Any) -> dict[str, Any]:
    """Return a sample whose branches go down to each scale at the given layer of the target node."""
    sample: dict[str, Any] = {}
    for label, values in space.layout.choices.items():
        if label.startswith("in_"):
            scale, layer = (int(part[1:]) for part in label.removeprefix("in_").split("_"))
            sample[label] = [0 if downs.get(scale) == layer else 1]
        else:
            sample[label] = operator if label.startswith("op_") else values[0]
    return sample | choices


def trained(network: DerivedNetwork) -> DerivedNetwork:
    """Move the statistics away from their start, so that logits depend on the image."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return network.eval()


def test_plan_shares_cells_until_the_branches_part() -> None:
    space = NASBraNet("tiny", n_layers=6)
    plan = space.plan(sample_of(space, downs={4: 4}, branches="2_4"))
    assert [(s.name, s.branches) for s in plan.steps] == [
        ("s2_l1_keep", (2, 4)),
        ("s2_l2_keep", (2, 4)),
        ("s2_l3_keep", (2,)),
        ("s2_l4_keep", (2,)),
        ("s2_l5_keep", (2,)),
        ("s2_l6_keep", (2,)),
        ("s2_l3_down", (4,)),
        ("s4_l4_keep", (4,)),
        ("s4_l5_keep", (4,)),
        ("s4_l6_keep", (4,)),
    ]


def test_shared_cells_are_one_module_run_once() -> None:
    space = NASBraNet("tiny", n_layers=6)
    network = space.freeze(sample_of(space, downs={4: 4}, branches="2_4")).eval()
    ran: list[str] = []
    for name, cell in network.cells.items():
        cell.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(IMAGE)
    assert sorted(ran) == sorted(step.name for step in network.plan.steps)


def test_network_holds_plain_layers_only() -> None:
    space = NASBraNet("tiny")
    network = space.freeze(random_sample(space, 0))
    assert {type(module).__module__.split(".")[0] for module in network.modules()} == {"torch", "glioma_nas"}


def test_training_returns_auxiliary_logits_of_the_branches_only() -> None:
    space = NASBraNet("tiny")
    network = space.freeze(sample_of(space, downs={}, branches="2_8"))
    outputs = network.train()(IMAGE)
    assert list(outputs) == ["logits", "scale_2", "scale_8"]
    assert all(logits.shape == (3, 2, 32, 32) for logits in outputs.values())
    assert network.eval()(IMAGE).shape == (3, 2, 32, 32)


def test_every_parameter_is_trained() -> None:
    space = NASBraNet("tiny")
    network = space.freeze(random_sample(space, 1)).train()
    sum(logits.square().mean() for logits in network(IMAGE).values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_stride_1_skips_are_removed_but_not_below_the_minimal_depth() -> None:
    space = NASBraNet("tiny", n_layers=9)
    all_skips = sample_of(space, downs={4: 5}, operator="skip", branches="2_4")
    plan = space.plan(all_skips)
    depth = {scale: len(plan.branch_steps(scale)) for scale in (2, 4)}
    assert depth == {2: 3, 4: 5}  # round(9/3) + 2 for each downsampling
    some = all_skips | {f"op_s4_l{layer}": "conv3x3" for layer in range(5, 10)}
    some |= {f"op_s2_l{layer}": "conv3x3" for layer in (4, 7, 9)}
    plan = space.plan(some)
    assert [plan.steps[index].cell.name for index in plan.branch_steps(2)] == ["s2_l4", "s2_l7", "s2_l9"]
    assert plan.removed[4] == {Cell(2, 1), Cell(2, 2), Cell(2, 3)}


def test_last_segment_keeps_a_cell_when_it_is_all_skips() -> None:
    space = NASBraNet("tiny", n_layers=9)
    sample = sample_of(space, downs={4: 8}, branches="2_4") | {"op_s4_l8": "skip", "op_s4_l9": "skip"}
    plan = space.plan(sample)
    last = [plan.steps[i] for i in plan.branch_steps(4)][-1]
    assert (last.cell.name, last.operator, last.out_channels) == ("s4_l8", "skip", 2 * 4)


def test_trailing_skips_leave_the_end_width_to_the_last_cell_that_stays() -> None:
    space = NASBraNet("tiny", n_layers=9)
    sample = sample_of(space, downs={4: 9}, branches="2_4", width_ends=4)
    sample |= {"op_s2_l8": "skip", "op_s2_l9": "skip"}
    network = space.freeze(sample)
    plan = network.plan
    fine, coarse = (plan.steps[plan.branch_steps(scale)[6]] for scale in (2, 4))
    # Both pass cell (2, 7), but one ends there with the end width: from here on they share nothing.
    assert fine.cell == coarse.cell == Cell(2, 7)
    assert (fine.width, coarse.width) == (4, 2)
    assert fine.name != coarse.name
    assert network.eval()(IMAGE).shape == (3, 2, 32, 32)


def test_kept_skips_stay_in_the_place_of_others() -> None:
    space = NASBraNet("tiny", n_layers=9)
    sample = sample_of(space, downs={4: 5}, operator="skip", branches="2_4", kept_skips=["s2_l9", "s2_l8", "s2_l7"])
    plan = space.plan(sample)
    assert {"s2_l7_keep", "s2_l8_keep", "s2_l9_keep"} <= {step.name for step in plan.steps}


def test_down_operators_replace_a_skip_for_the_branch_that_goes_down() -> None:
    space = NASBraNet("tiny", n_layers=9)
    sample = sample_of(space, downs={4: 4}, branches="2_4", op_s2_l3="skip", down_operators={"s2_l3": "zoomed_conv"})
    plan = space.plan(sample)
    assert [step.operator for step in plan.steps if step.cell == Cell(2, 3)] == ["zoomed_conv"]
    assert Cell(2, 3) in plan.removed[2]
    space.freeze(sample).eval()(IMAGE)


def test_skip_policy_conv_keeps_every_skip() -> None:
    space = NASBraNet("tiny", skip_policy="conv")
    plan = space.plan(sample_of(space, downs={4: 3}, operator="skip", branches="2_4"))
    assert [len(plan.branch_steps(scale)) for scale in (2, 4)] == [4, 4]


def test_any_sample_gives_a_network_that_runs() -> None:
    space = NASBraNet("tiny", n_layers=5)
    for seed in range(25):
        sample = random_sample(space, seed)
        # Half of the cells are skips, so that every rule about skips is met.
        rng = np.random.default_rng(seed)
        sample |= {label: "skip" for label in sample if label.startswith("op_") and rng.random() < 0.5}
        assert space.freeze(sample).eval()(IMAGE).shape == (3, 2, 32, 32)


def test_state_dict_and_deepcopy_keep_the_logits() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 2)
    network = trained(space.freeze(sample))
    again = space.freeze(sample).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected = network(IMAGE)
        assert float(expected.std(dim=(0, 2, 3)).min()) > 1e-3
        assert torch.equal(again(IMAGE), expected)
        assert torch.equal(copy.deepcopy(network)(IMAGE), expected)


@pytest.mark.slow
def test_onnx_runtime_agrees_for_any_batch() -> None:
    space = NASBraNet("tiny")
    for seed in range(3):
        network = trained(space.freeze(random_sample(space, seed)))
        file = io.BytesIO()
        torch.onnx.export(
            network,
            (IMAGE[:1],),
            file,
            opset_version=17,
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
        )
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": IMAGE.numpy()})
        with torch.no_grad():
            expected = network(IMAGE).numpy()
        assert expected.std(axis=(0, 2, 3)).min() > 1e-3
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        exported = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node].count("Conv")
        parts = (network.stem, network.cells, network.head)
        assert exported == sum(isinstance(m, nn.Conv2d) for part in parts for m in part.modules()), "auxiliary heads"


@pytest.mark.slow
def test_torch_export_agrees() -> None:
    space = NASBraNet("tiny")
    network = trained(space.freeze(random_sample(space, 2)))
    exported = torch.export.export(network, (IMAGE,)).module()
    torch.testing.assert_close(exported(IMAGE), network(IMAGE))


def test_network_refuses_an_image_that_is_not_divisible() -> None:
    space = NASBraNet("tiny")
    with pytest.raises(ArchitectureError, match="24x32 pixels: both must be divisible by 16"):
        space.freeze(random_sample(space, 0))(torch.zeros(1, 2, 24, 32))
