"""Where a marker classifier looks: Grad-CAM maps of a patient's slices, and a check that they depend on the weights.

References:
    Selvaraju et al., Grad-CAM, ICCV 2017.
    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018: a map that stays when weights are randomised explains
    nothing.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from glioma_nas.errors import ConfigError
from glioma_nas.markers import MarkerCase
from glioma_nas.seeding import isolated_torch_rng

Maps = NDArray[np.float32]


MIN_PLACES = 6
"""Places along a side that the last stage needs: a slice of 96 pixels has 3 there, and 6 after the stage before.

Still earlier stages are not looked at: there one mean gradient for a whole channel says little about the class."""


@runtime_checkable
class HasStages(Protocol):
    """A network that says which modules' maps are to be looked at."""

    @property
    def stages_of_trunks(self) -> list[list[nn.Module]]:
        """The stages of every trunk from shallow to deep, each giving maps (N, F, H', W')."""


class _OneInput(nn.Module):
    """Take image and mask as one tensor, as MONAI's Grad-CAM wants it, and give logits of both classes, (N, 2)."""

    def __init__(self, network: nn.Module, metadata: Tensor) -> None:
        super().__init__()
        self.network = network
        self.metadata = metadata

    def forward(self, stacked: Tensor) -> Tensor:
        metadata = self.metadata.expand(len(stacked), -1)
        logit = self.network(stacked[:, :-1], stacked[:, -1:], metadata)["final"]
        return torch.stack([-logit, logit], dim=1)


def grad_cam(network: nn.Module, case: MarkerCase, metadata: NDArray[np.float32], *, positive: bool = True) -> Maps:
    """Return how much each pixel speaks for a class, float32 (S, H, W) in [0, 1]; of several trunks the mean.

    Each slice's map is scaled to [0, 1] by itself; a slice in which nothing speaks for the class is 0.

    Args:
        network: A trained `glioma_nas.slice_classifier.SliceNetwork` with ``stages_of_trunks``. Of each trunk the
            last stage is looked at, or the one before where the last has fewer than `MIN_PLACES` places a side.
        case: The patient's slices and masks.
        metadata: (2,), age and sex as `glioma_nas.markers.MetadataEncoder` gives them.
        positive: For the positive class; else for the negative one.

    Raises:
        ConfigError: The network does not say where to look.
    """
    from monai.visualize import GradCAM

    if not isinstance(network, HasStages):
        raise ConfigError(f"{type(network).__name__} has no stages_of_trunks: Grad-CAM does not know where to look")
    network.eval()
    wrapped = _OneInput(network, torch.from_numpy(np.asarray(metadata, dtype=np.float32)))
    names = {id(module): name for name, module in wrapped.named_modules()}
    stacked = torch.from_numpy(np.concatenate([case.images, case.mask[:, None].astype(np.float32)], axis=1))
    total = np.zeros(case.mask.shape, dtype=np.float32)
    stages = _stages_to_see(wrapped, network.stages_of_trunks, stacked[:1])
    for stage in stages:
        cam = GradCAM(wrapped, target_layers=names[id(stage)], postprocessing=lambda maps: maps)
        for index in range(len(stacked)):
            # GradCAM leaves hooks on a shared module only for as long as it lives.
            found = cam(stacked[index : index + 1].clone(), class_idx=int(positive))
            total[index] += _scaled(torch.relu(found)[0, 0].detach().numpy())
    return np.asarray(total / len(stages), dtype=np.float32)


def _stages_to_see(wrapped: nn.Module, trunks: Sequence[Sequence[nn.Module]], one: Tensor) -> list[nn.Module]:
    places: dict[int, int] = {}

    def note(module: nn.Module, given: Any, maps: Tensor) -> None:
        places[id(module)] = min(maps.shape[-2:])

    hooks = [stage.register_forward_hook(note) for stages in trunks for stage in stages]
    with torch.no_grad():
        wrapped(one)
    for hook in hooks:
        hook.remove()
    return [stages[-1] if places[id(stages[-1])] >= MIN_PLACES else stages[-2:][0] for stages in trunks]


def randomised_similarity(
    network: nn.Module, case: MarkerCase, metadata: NDArray[np.float32], *, seed: int = 0
) -> float | None:
    """Return Spearman's correlation of the signed map with the one of the same network with random weights.

    The signed map is that for the positive class minus that for the negative one, because a random network often finds
    nothing for one of them. Near 0 the map depends on what was learnt; near 1 it does not and should not be believed.
    None when one of the maps is constant.
    """
    randomised = copy.deepcopy(network)
    with isolated_torch_rng(seed, "randomised weights"):
        for module in randomised.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    first, second = (
        (grad_cam(net, case, metadata) - grad_cam(net, case, metadata, positive=False)).ravel()
        for net in (network, randomised)
    )
    if first.std() == 0 or second.std() == 0:
        return None
    return float(spearmanr(first, second).statistic)


def overlay_png(case: MarkerCase, maps: Maps, *, title: str, channels: Sequence[str]) -> bytes:
    """Draw each slice, its mask's outline and the map over it, one column a slice, as PNG.

    Args:
        case: The patient's slices.
        maps: See `grad_cam`.
        title: Above the picture; no patient identifiers.
        channels: Names of the sequences; the last one is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(maps)
    figure = Figure(figsize=(1.6 * count + 0.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, squeeze=False)
    for index in range(count):
        picture = case.images[index, -1]
        low, high = np.percentile(picture, [1, 99])
        for row in (0, 1):
            shown = axes[row, index]
            shown.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            if case.mask[index].any():
                shown.contour(case.mask[index], [0.5], colors="#39d0ff", linewidths=0.8)
            shown.set_axis_off()
        # Where nothing speaks for the class, the anatomy stays to be seen.
        axes[1, index].imshow(maps[index], cmap="inferno", vmin=0, vmax=1, alpha=0.7 * maps[index])
        axes[0, index].set_title(f"slice {case.slices[index]}", fontsize=7)
    figure.suptitle(f"{title}; {channels[-1]}, outline: mask", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def to_volume(case: MarkerCase, maps: Maps, shape: tuple[int, int, int]) -> Maps:
    """Put the maps back among all prepared slices, float32 (Z, H, W), 0 in slices that were not looked at.

    Args:
        case: Says which slices they are.
        maps: See `grad_cam`.
        shape: (Z, H, W) of the prepared case.
    """
    volume = np.zeros(shape, dtype=np.float32)
    resized = torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None], size=shape[1:], mode="bilinear")
    volume[list(case.slices)] = resized[:, 0].numpy()
    return volume


def _scaled(found: NDArray[np.float32]) -> NDArray[np.float32]:
    high = float(found.max())
    return found / high if high > 0 else np.zeros_like(found)
