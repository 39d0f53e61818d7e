"""Time a cross-validated marker study on a CPU, and say what it found.

Cuts the classifier inputs once (they stay in memory for all folds and epochs), cross-validates one marker's classifier
and its baselines, and prints CPU seconds of each part with the patient-level result. Target: 55 patients, five folds,
small backbone, within 30 CPU minutes. Usage::

    python benchmarks/classify.py CONFIG RUN_FOLDER --marker idh
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from glioma_nas.config import load_config
from glioma_nas.files import write_json
from glioma_nas.marker_analysis import analyse, before_temperature
from glioma_nas.marker_masks import mask_source
from glioma_nas.pipeline import Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.seeding import derive_seed
from glioma_nas.stages.classify import build_evaluators, cut_cases, plan_marker


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--marker", default="idh")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if (arguments.run_folder / "benchmark").exists():
        # Finished folds would be read back: no time would be measured, and they may be of other settings.
        parser.error(f"{arguments.run_folder / 'benchmark'} exists; delete it or name another run folder")
    Pipeline(config, arguments.run_folder, Silent()).run(["preprocess"])
    cohort = PreparedCohort.load(arguments.run_folder / "preprocess")
    segmented = arguments.run_folder / "segment"
    marker = config.classify.markers[arguments.marker]
    masks = mask_source(config, segmented if segmented.is_dir() else None)
    plan = plan_marker(config, cohort, masks, arguments.marker, marker)
    started = time.process_time()
    cases = cut_cases(config, cohort, plan)
    seconds = {"cut slices": time.process_time() - started}
    started = time.process_time()
    for case in cases:
        np.array(case.images)
    seconds["read them again from memory"] = time.process_time() - started
    frames = {}
    for name, evaluator in build_evaluators(config, marker).items():
        started = time.process_time()
        frames[name] = evaluator.cross_validate(
            cases,
            cohort.folds,
            folder=arguments.run_folder / "benchmark" / name,
            seed=derive_seed(config.seed, "classify", plan.name, name),
            device=config.device,
        )
        seconds[f"cross-validate {name}"] = time.process_time() - started
    started = time.process_time()
    analysis = analyse(
        frames,
        classifiers=(marker.classifier,),
        seed=config.seed,
        marker=plan.name,
        bootstrap_samples=config.classify.bootstrap_samples,
        permutation_samples=config.classify.permutation_samples,
    )
    seconds["statistics"] = time.process_time() - started
    for what, value in seconds.items():
        print(f"{what:32s} {value:8.2f} s CPU")
    print(f"{'all':32s} {sum(seconds.values()) / 60:8.2f} min CPU, {len(cases)} cases, {cohort.folds.n} folds")
    for name, report in analysis.reports.items():
        auc, called = report["auc"], report["balanced_accuracy"]
        print(
            f"{name:14s} AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})  balanced accuracy {called.value:.3f} "
            f"({called.low:.3f} to {called.high:.3f})  n = {auc.n}, {auc.n_positive} positive"
        )
    print(analysis.statement(marker.classifier))
    print("before temperature scaling:", json.dumps(before_temperature(frames[marker.classifier])))
    content = {name: {key: item.as_json() for key, item in report.items()} for name, report in analysis.reports.items()}
    write_json(arguments.run_folder / "benchmark" / "figures.json", content)


if __name__ == "__main__":
    main()
