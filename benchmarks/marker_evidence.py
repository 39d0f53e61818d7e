"""Does the marker machinery find what is there, and only that? On a synthetic cohort, whose answers are known.

With true masks and images only: IDH (planted in the images) from MIX and from IMG, and MGMT (which leaves no trace),
over seeds, out-of-fold by patient. Prints one row a seed and the means. Usage::

    python benchmarks/marker_evidence.py CONFIG RUN_FOLDER --seeds 3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from glioma_nas.config import MarkerConfig, load_config
from glioma_nas.files import read_json, sha256_file, write_json
from glioma_nas.marker_evaluator import build_evaluator, patient_level
from glioma_nas.marker_masks import mask_source
from glioma_nas.pipeline import MANIFEST, Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.roc_analysis import delong
from glioma_nas.seeding import derive_seed
from glioma_nas.stages.classify import classifier_settings, cut_cases, plan_marker

RUNS = {
    "idh MIX": (MarkerConfig(column="idh", positive="mutant"), {"mode": "MIX", "metadata": False}),
    "idh IMG": (MarkerConfig(column="idh", positive="mutant"), {"mode": "IMG", "metadata": False}),
    "mgmt MIX": (MarkerConfig(column="mgmt", positive="methylated"), {"mode": "MIX", "metadata": False}),
}


def main() -> None:
    """Run every seed and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, ["classify.masks=expert"])
    Pipeline(config, arguments.run_folder, Silent()).run(["preprocess"])
    cohort = PreparedCohort.load(arguments.run_folder / "preprocess")
    # Finished folds are read back, so the folder must not be of other settings or slices.
    record = arguments.run_folder / "evidence" / "settings.json"
    settings = {
        "classify": config.classify.model_dump(mode="json"),
        "slices": sha256_file(arguments.run_folder / "preprocess" / MANIFEST),
    }
    if record.parent.exists() and (not record.is_file() or read_json(record) != settings):
        parser.error(f"{record.parent} holds another study; delete it or name another run folder")
    write_json(record, settings)
    masks = mask_source(config, None)
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for seed in range(arguments.seeds):
        for name, (marker, options) in RUNS.items():
            started = time.process_time()
            plan = plan_marker(config, cohort, masks, name, marker)
            evaluator = build_evaluator("idh", classifier_settings(config.classify, marker), options)
            frame = evaluator.cross_validate(
                cut_cases(config, cohort, plan),
                cohort.folds,
                folder=arguments.run_folder / "evidence" / f"seed{seed}" / name.replace(" ", "_"),
                seed=derive_seed(seed, "evidence"),
            )
            patients = patient_level(frame)
            auc = delong(patients["label"], patients["probability"])
            found[name].append(auc.value)
            print(
                f"seed {seed}  {name:9s} AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f}), n = {auc.n}, "
                f"{auc.n_positive} positive, {time.process_time() - started:.0f} s CPU",
                flush=True,
            )
    for name, values in found.items():
        print(f"mean over {len(values)} seeds  {name:9s} {np.mean(values):.3f}")
    gaps = np.subtract(found["idh MIX"], found["idh IMG"])
    print(f"MIX minus IMG by seed: {', '.join(f'{gap:+.3f}' for gap in gaps)}; mean {gaps.mean():+.3f}")


if __name__ == "__main__":
    main()
