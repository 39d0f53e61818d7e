"""Score a segmentation network by what its masks are good for: the AUC of markers that are predicted from them.

A search that is told ``search.marker_weight`` v > 0 ranks networks by (1 - v)·Dice + v·AUC instead of the Dice alone.
Only patients whom the network's weights have never met are scored, and their classifiers are trained and tested on
folds of those very patients: neither side of the AUC has seen whom it is taken on. Folds and the classifiers' seeds are
the same for every network, so that two scores differ by the masks alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glioma_nas.config import ClassifyConfig, MarkerConfig, RunConfig
from glioma_nas.errors import ConfigError, LabelError, LeakageError
from glioma_nas.marker_evaluator import MarkerEvaluator, build_evaluator
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy, labels_of_study
from glioma_nas.markers import encode_labels
from glioma_nas.prepared import PreparedCohort
from glioma_nas.seeding import derive_seed

N_FOLDS = 3
"""Folds of the scored patients; fewer when a class has fewer patients."""


def blended_accuracy(dice: float, aucs: Mapping[str, float], weight: float) -> float:
    """Return (1 - v)·Dice + v·mean AUC, the accuracy ACC(m) that Target(m) takes.

    Args:
        dice: Mean Dice in [0, 1].
        aucs: Marker → AUC in [0, 1]; may be empty only with weight 0.
        weight: v in [0, 1].

    >>> round(blended_accuracy(0.8, {"idh": 0.7, "ki67": 0.5}, 0.25), 3)
    0.75
    """
    if weight == 0:
        return dice
    return (1 - weight) * dice + weight * sum(aucs.values()) / len(aucs)


def marker_strata(config: RunConfig, prepared: Path, markers: Sequence[str] | None = None) -> dict[str, str]:
    """Return patient → his classes, to halve the patients so that both halves hold every class.

    Args:
        config: The run's configuration.
        prepared: Folder of the preprocess stage.
        markers: Names of the markers; none for all of the configuration.

    Raises:
        LabelError: A marker's labels cannot be used.
    """
    cases = list(PreparedCohort.load(prepared).cases.values())
    labels = {
        name: encode_labels(cases, name, config.classify.markers[name], sheet=config.cohort.sheet)
        for name in markers or config.classify.markers
    }
    return {
        case.patient_id: ", ".join(f"{name} {of_case.get(case.case_id, '?')}" for name, of_case in labels.items())
        for case in cases
    }


class DownstreamScore:
    """The AUCs that networks with the same training patients give on the same other patients.

    Args:
        config: The run's configuration: markers, their classifiers, ``search.marker_weight``,
            ``search.marker_classifier``.
        prepared: Folder of the preprocess stage.
        network_patients: Patients whom the networks' weights are trained on.
        case_ids: Cases to score; their patients must be others.
        markers: Names of the markers; none for all of the configuration.
        seed: Seed of folds and classifiers.

    Attributes:
        weight: v of `blended_accuracy`.
        seconds: Wall time spent so far.
        trainings: Classifiers trained so far.

    Raises:
        LeakageError: A case to score belongs to a patient the networks are trained on.
        LabelError: A marker cannot be scored on these cases; found here, before anything is searched.
        ConfigError: There is no marker, or a classifier does not take its options.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Path,
        *,
        network_patients: Sequence[str],
        case_ids: Sequence[str],
        markers: Sequence[str] | None = None,
        seed: int,
    ) -> None:
        chosen = {name: config.classify.markers[name] for name in markers or config.classify.markers}
        if not chosen:
            raise ConfigError("search.marker_weight needs classify.markers; add a marker, or set the weight to 0")
        self.weight = config.search.marker_weight
        self.seconds = 0.0
        self.trainings = 0
        cohort = PreparedCohort.load(prepared)
        shared = {cohort.cases[case_id].patient_id for case_id in case_ids} & set(network_patients)
        if shared:
            raise LeakageError(
                f"patient {min(shared)} trains the network and would be scored by its masks; score others"
            )
        self._evaluators: dict[str, MarkerEvaluator] = {}
        self.patients: dict[str, tuple[int, int]] = {}
        for name, rule in chosen.items():
            study = MarkerStudy(
                preprocess_folder=prepared,
                marker=name,
                config=rule,
                sheet=config.cohort.sheet,
                network_sequences=config.cohort.channels,
                network_patients=tuple(network_patients),
                case_ids=tuple(case_ids),
                seed=derive_seed(seed, "downstream"),
                device=config.device,
                missing_sequence="zero" if config.cohort.feeds_zeros else config.cohort.missing_sequence,
                own_folds=N_FOLDS,
            )
            classifier = config.search.marker_classifier or rule.classifier
            options = rule.options if classifier == rule.classifier else {}
            settings = _settings(config.classify, rule)
            try:
                labels = labels_of_study(study, settings)
            except LabelError as err:
                raise LabelError(
                    f"marker '{name}' cannot score networks on the {len(case_ids)} cases that they are not trained on; "
                    f"add patients, or set search.marker_weight to 0: {err}"
                ) from err
            of_patient = {cohort.cases[case_id].patient_id: label for case_id, label in labels.items()}
            self.patients[name] = (len(of_patient), sum(of_patient.values()))
            self._evaluators[name] = build_evaluator(classifier, settings, options, study=study)

    def aucs(self, network: Any) -> dict[str, float]:
        """Return the patient-level, out-of-fold AUC of every marker, predicted from the network's masks.

        Args:
            network: (N, C, H, W) → logits (N, K, H, W); class 0 is background. Stays on its device, in its mode.
        """
        started = time.monotonic()
        found = {}
        for name, evaluator in self._evaluators.items():
            found[name] = evaluator.measure(network).value
            n, n_positive = self.patients[name]
            self.trainings += min(N_FOLDS, n_positive, n - n_positive)
        self.seconds += time.monotonic() - started
        return found

    def accuracy(self, dice: float, aucs: Mapping[str, float]) -> float:
        """Return what networks are ranked by before latency; see `blended_accuracy`."""
        return blended_accuracy(dice, aucs, self.weight)

    def cost(self) -> dict[str, Any]:
        """Return what was scored and what it cost so far, as plain data for the records."""
        return {
            "marker_weight": self.weight,
            "markers": {
                name: {"n_patients": n, "n_positive": n_positive} for name, (n, n_positive) in self.patients.items()
            },
            "classifiers_trained": self.trainings,
            "seconds": round(self.seconds, 1),
        }

    def note(self) -> str:
        """Return the sentence for the records: what was scored, and what it cost."""
        markers = ", ".join(f"{name} (n = {n}, {positive} positive)" for name, (n, positive) in self.patients.items())
        return (
            f"networks were ranked with marker_weight {self.weight:g} on {markers}: {self.trainings} classifiers "
            f"trained, {self.seconds:.0f} s"
        )


def _settings(config: ClassifyConfig, marker: MarkerConfig) -> ClassifierSettings:
    from glioma_nas.stages.classify import classifier_settings  # a stage: imported late, as stages import this

    return classifier_settings(config, marker)
