"""Draw where a cross-validated classifier looked, for a few telling patients: PNG overlays and NIfTI maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from glioma_nas.files import atomic_path, write_bytes
from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.prepared import PreparedCase
from glioma_nas.progress import Progress
from glioma_nas.saliency import HasStages, grad_cam, overlay_png, randomised_similarity, to_volume
from glioma_nas.slice_classifier import SliceClassifierEvaluator


def telling_cases(frame: pd.DataFrame, count: int) -> list[tuple[str, int, str]]:
    """Choose the surest right and the surest wrong cases of each class, in turn.

    Args:
        frame: Out-of-fold predictions, one row a case.
        count: At most so many.

    Returns:
        Case id, fold, and in words why it was chosen.
    """
    margin = frame["probability"] - frame["threshold"]
    right = (margin >= 0) == (frame["label"] == 1)
    groups = []
    for correct in (True, False):
        for label, name in ((1, "positive"), (0, "negative")):
            rows = frame[(right == correct) & (frame["label"] == label)]
            rows = rows.loc[margin[rows.index].abs().sort_values(ascending=False, kind="stable").index]
            words = f"{name}, {'right' if correct else 'wrong'}"
            groups.append([(str(row["case_id"]), int(row["fold"]), words) for row in rows.to_dict("records")])
    chosen = []
    for place in range(max(map(len, groups), default=0)):
        chosen += [group[place] for group in groups if place < len(group)]
    return chosen[:count]


def draw_grad_cam(
    evaluator: SliceClassifierEvaluator,
    folder: Path,
    frame: pd.DataFrame,
    cases: Sequence[MarkerCase],
    prepared: Mapping[str, PreparedCase],
    *,
    out: Path,
    count: int,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write ``<case>.png`` and ``<case>.nii.gz`` for some cases, each with the network that did not see its patient.

    The NIfTI holds the map for the called class, in [0, 1], on the scan's own grid; 0 in slices not looked at.

    Args:
        evaluator: Of the classifier.
        folder: Its folds.
        frame: Its out-of-fold predictions.
        cases: The classifier inputs.
        prepared: Case id → prepared case.
        out: Where to write.
        count: See `telling_cases`.
        seed: Of the randomised weights.
        progress: Where to report.

    Returns:
        One record a case: id, fold, why, files, and the similarity with the map of randomised weights. Empty when the
        network does not say where to look.
    """
    by_id = {case.case_id: case for case in cases}
    records = []
    chosen = telling_cases(frame, count)
    probability = dict(zip(frame["case_id"], frame["probability"].astype(float), strict=True))
    threshold = dict(zip(frame["case_id"], frame["threshold"].astype(float), strict=True))
    with progress.task("Grad-CAM", len(chosen)) as task:
        for case_id, fold, words in chosen:
            network, record = evaluator.load_network(folder / f"fold{fold}")
            if not isinstance(network, HasStages):
                progress.note("Grad-CAM: this classifier does not say where to look; no maps")
                return []
            case = by_id[case_id]
            metadata = MetadataEncoder(**record["metadata"])([case])[0]
            called = probability[case_id] >= threshold[case_id]
            maps = grad_cam(network, case, metadata, positive=called)
            title = f"{words}; p = {probability[case_id]:.2f}, called {'positive' if called else 'negative'}"
            picture = overlay_png(case, maps, title=title, channels=evaluator.settings.sequences)
            write_bytes(out / f"{case_id}.png", picture)
            scan = prepared[case_id]
            shape = (scan.n_slices, *scan.images().shape[2:])
            _write_nifti(out / f"{case_id}.nii.gz", scan, to_volume(case, maps, (shape[0], shape[1], shape[2])))
            similarity = randomised_similarity(network, case, metadata, seed=seed)
            records.append(
                {
                    "case_id": case_id,
                    "fold": fold,
                    "why": words,
                    "png": f"{case_id}.png",
                    "nifti": f"{case_id}.nii.gz",
                    "similarity_with_randomised_weights": None if similarity is None else round(similarity, 3),
                }
            )
            task.advance(1)
    return records


def _write_nifti(path: Path, case: PreparedCase, volume: np.ndarray[Any, Any]) -> None:
    image = nib.Nifti1Image(np.clip(case.to_native(volume), 0, 1).astype(np.float32), case.native_affine)
    image.set_qform(case.native_affine, code=1)
    image.set_sform(case.native_affine, code=1)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
