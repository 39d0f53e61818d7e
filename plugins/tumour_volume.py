"""A baseline that looks at one number of the image: logistic regression on the volume of the predicted tumour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.plugins.feature_regression import FeatureRegression
from glioma_nas.registry import classifiers


@classifiers.register("tumour_volume")
class TumourVolumeEvaluator(FeatureRegression):
    """Logistic regression on the logarithm of the predicted tumour's volume."""

    def features(self, cases: Sequence[MarkerCase], metadata: MetadataEncoder) -> NDArray[np.float64]:
        """See `FeatureRegression.features`; log(1 + volume in ml), 0 for an empty mask."""
        return np.log1p(np.asarray([[case.tumour_volume_ml] for case in cases], dtype=np.float64))
