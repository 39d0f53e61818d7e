"""Grad-CAM gives the map that follows from a network's construction, and its sanity check tells networks apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from glioma_nas.errors import ConfigError
from glioma_nas.plugins.central_net import CentralNet
from glioma_nas.plugins.idh import IdhNetwork
from glioma_nas.plugins.kinet import PRESETS, KiNet
from glioma_nas.saliency import grad_cam, randomised_similarity, to_volume
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.slice_classifier import SliceNetwork
from glioma_nas.testing.classifier_suite import phantom_cases

METADATA = np.asarray([0.5, 0.5], dtype=np.float32)


class Brightness(SliceNetwork):
    """Says the mean of the first sequence, so that each pixel speaks for the positive class as it is bright."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.stage.weight)

    @property
    def stages_of_trunks(self):
        return [[self.stage]]

    def forward(self, image, mask, metadata):
        return {"final": self.stage(image[:, :1]).mean(dim=(2, 3))[:, 0]}


@pytest.mark.parametrize(("positive", "sign"), [(True, 1), (False, -1)])
def test_map_is_the_evidence_of_each_pixel_for_the_class(positive, sign):
    case = phantom_cases(2)[1]
    maps = grad_cam(Brightness(), case, METADATA, positive=positive)
    evidence = np.maximum(sign * case.images[:, 0], 0)
    np.testing.assert_allclose(maps, evidence / evidence.max(axis=(1, 2), keepdims=True), atol=1e-5)


class CoarseEnd(Brightness):
    """The same, over a last stage of 2×2 places, as a small slice has after four stages."""

    def __init__(self):
        super().__init__()
        self.end = nn.AdaptiveAvgPool2d(2)

    @property
    def stages_of_trunks(self):
        return [[self.stage, self.end]]

    def forward(self, image, mask, metadata):
        return {"final": self.end(self.stage(image[:, :1])).mean(dim=(2, 3))[:, 0]}


def test_map_is_taken_from_a_stage_that_is_fine_enough_to_show_a_place():
    case = phantom_cases(2)[1]
    np.testing.assert_allclose(grad_cam(CoarseEnd(), case, METADATA), grad_cam(Brightness(), case, METADATA), atol=1e-5)


NETWORKS = {
    "IMG": lambda: IdhNetwork(2, backbone="small_resnet", mode="IMG", metadata=True),
    "ROI": lambda: IdhNetwork(2, backbone="small_resnet", mode="ROI", metadata=True),
    "MIX": lambda: IdhNetwork(2, backbone="small_resnet", mode="MIX", metadata=True),
    "MIX, two trunks": lambda: IdhNetwork(2, backbone="small_resnest", mode="MIX", metadata=True, fusion="late"),
    "KiNet": lambda: KiNet(PRESETS["small"]),
    "CentralNet": lambda: CentralNet("small"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_randomised_weights_change_the_map_of_every_network(name):
    case = phantom_cases(2, side=64)[1]
    with isolated_torch_rng(0, "weights"):
        network = NETWORKS[name]()
    maps = grad_cam(network, case, METADATA)
    assert maps.shape == case.mask.shape
    assert maps.min() >= 0 and maps.max() <= 1
    similarity = randomised_similarity(network, case, METADATA)
    assert similarity is not None and abs(similarity) < 0.95


def test_map_that_does_not_depend_on_the_weights_is_found_out():
    """A 1×1 convolution scales the picture only: whatever its weight, the order of the pixels stays, or is turned."""
    similarity = randomised_similarity(Brightness(), phantom_cases(2)[1], METADATA)
    assert similarity is not None and abs(similarity) == pytest.approx(1.0, abs=1e-3)


def test_similarity_is_none_when_a_map_is_constant():
    case = phantom_cases(2)[1]
    flat = replace(case, images=np.zeros_like(case.images))
    assert randomised_similarity(Brightness(), flat, METADATA) is None


def test_maps_are_put_back_where_the_slices_were():
    case = replace(phantom_cases(2)[1], slices=(1, 4))
    maps = np.ones((2, 32, 32), dtype=np.float32)
    volume = to_volume(case, maps, (6, 16, 16))
    assert volume.any(axis=(1, 2)).tolist() == [False, True, False, False, True, False]


def test_network_that_does_not_say_where_to_look_is_refused():
    with pytest.raises(ConfigError, match="has no stages_of_trunks: Grad-CAM does not know where to look"):
        grad_cam(nn.Identity(), phantom_cases(2)[1], METADATA)
