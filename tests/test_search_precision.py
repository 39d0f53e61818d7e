"""Mixed precision in the search: faster where the hardware has it, and the same networks but for rounding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from supernets import soft, tiny_supernet
from torch import nn

from glioma_nas.evaluators.segmentation import SegmentationEvaluator
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.one_shot import CoSearch
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=4, image_size_px=32)


def make_evaluator(prepared: Path, folder: Path, **options: object) -> SegmentationEvaluator:
    return SegmentationEvaluator(
        str(prepared), ("t1ce", "flair"), folder=str(folder), epochs=2, steps_per_epoch=2, batch_size=4, **options
    )


def make_space() -> NASBraNet:
    return NASBraNet("tiny", image_size_px=32, in_channels=2, n_classes=2)


def note_types(module: nn.Module) -> set[torch.dtype]:
    """Return a set that fills with the types that convolutions compute in, while the module runs."""
    seen: set[torch.dtype] = set()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_co_search_in_mixed_precision_computes_in_bfloat16_and_keeps_float32(
    prepared: Path, tmp_path: Path, device: str
) -> None:
    from glioma_nas.nni_bridge import explore

    space = make_space()
    evaluator = make_evaluator(prepared, tmp_path, precision="bf16-mixed", device=device)
    strategy = CoSearch(latency_weight=0, pretrain_epochs=1, finetune_steps=1, recalibration_batches=1)
    mutate, seen = strategy.mutate_model, []

    def watched(model: object) -> object:
        mutated = mutate(model)
        seen.append(note_types(mutated))
        return mutated

    strategy.mutate_model = watched  # type: ignore[method-assign]  # to reach the supernet before it trains
    explore(space, evaluator, strategy)
    assert seen[0] == {torch.bfloat16}
    module = strategy.oneshot_module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert set(strategy.found) == {"teacher", "student"}
    assert all(math.isfinite(loss) for loss in evaluator.history()["loss_weights"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_supernet_gives_the_same_logits_in_mixed_precision_but_for_rounding(device: str) -> None:
    space, slot = tiny_supernet()
    space.to(device).train()
    images = torch.randn(4, 2, 32, 32, device=device)
    with torch.device(device):
        relaxation, parameters, _ = soft(space.layout, "student", 1)
    with slot.using(relaxation):
        expected = space(images)
        with torch.autocast(device, torch.bfloat16):
            mixed = space(images)
    for name, logits in expected.items():
        spread = float(logits.detach().std())
        assert float((mixed[name].float() - logits).detach().abs().mean()) < 0.1 * spread, name
    sum(logits.float().square().mean() for logits in mixed.values()).backward()
    assert float(parameters["op_s2_l1"].grad.abs().sum()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_supernet_gives_the_same_logits_on_a_gpu() -> None:
    space, slot = tiny_supernet()
    images = torch.randn(4, 2, 32, 32)
    results = []
    for device in ("cpu", "cuda"):
        space.to(device).train()
        with torch.device(device):
            relaxation, *_ = soft(space.layout, "student", 1)
        with slot.using(relaxation), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            results.append({name: logits.cpu() for name, logits in space(images.to(device)).items()})
    for name, logits in results[0].items():
        torch.testing.assert_close(results[1][name], logits, rtol=1e-3, atol=1e-3)
