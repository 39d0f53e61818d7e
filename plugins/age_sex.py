"""The baseline every marker classifier must beat: logistic regression on age and sex alone, without any image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.plugins.feature_regression import FeatureRegression
from glioma_nas.registry import classifiers


@classifiers.register("age_sex")
class AgeSexEvaluator(FeatureRegression):
    """Logistic regression on age and sex, the baseline beside every classifier."""

    def features(self, cases: Sequence[MarkerCase], metadata: MetadataEncoder) -> NDArray[np.float64]:
        """See `FeatureRegression.features`; age in hundreds of years and sex."""
        return metadata(cases).astype(np.float64)
