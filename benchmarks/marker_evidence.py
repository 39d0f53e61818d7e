"""Does the marker machinery find what is there, and only that? On a synthetic cohort, whose answers are known.

    python benchmarks/marker_evidence.py --out runs/evidence0
    python benchmarks/marker_evidence.py --out runs/evidence1 --cohort-seed 1   # other patients; then 2, 3 …
    python benchmarks/marker_evidence.py --pool runs/evidence0 runs/evidence1

About 15 minutes of one idle core with the defaults (96 patients, three folds, three seeds); it says what is left, and
the same command goes on where it was cut off. ``--pool A B C`` reads what was found in several cohorts: other patients,
folds and trainings, which makes them independent, as seeds on one cohort are not. With true masks, out-of-fold by
patient:

* IDH is planted in the images: is the interval of its AUC above 0.7 (images and mask only, no age)?
* The mask helps: over seeds, is MIX (images and mask) better than IMG (images)?
* MGMT leaves no trace but goes with IDH: is its AUC among patients of the same IDH status at one half? (Without holding
  IDH fixed it must be above one half, because images tell IDH.)
* KiNet runs in all eight ablations of {multi-scale loss, Merge-IN, metadata} on Ki67, one seed.

Small networks, short trainings, and no inner folds: the AUC needs no threshold. They say that the software works, not
how good the method is.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from glioma_nas.binary_statistics import bootstrap_interval
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.console import make_progress
from glioma_nas.files import read_json, sha256_file, write_json, write_text
from glioma_nas.folds import load_folds
from glioma_nas.marker_evaluator import build_evaluator, patient_level
from glioma_nas.marker_masks import mask_source
from glioma_nas.markers import MarkerCase
from glioma_nas.pipeline import MANIFEST, Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.roc_analysis import auc, auc_within, delong, paired_delong
from glioma_nas.seeding import derive_seed, numpy_generator
from glioma_nas.stages.classify import classifier_settings, cut_cases, plan_marker
from glioma_nas.synthetic_cohort import write_synthetic_cohort

SIZE_PX = 64
DRAWS = 1000
MARKERS = {
    "idh": {"column": "idh", "positive": "mutant"},
    "mgmt": {"column": "mgmt", "positive": "methylated"},
    "ki67": {"column": "ki67", "threshold": 10},
}


@dataclass(frozen=True)
class Job:
    """One cross-validation.

    Attributes:
        name: Of its folder and row.
        marker: One of `MARKERS`.
        classifier: Registered name.
        options: Of the classifier.
        seed: Of weights and draws.
    """

    name: str
    marker: str
    classifier: str
    options: Mapping[str, Any]
    seed: int


def jobs(seeds: int) -> list[Job]:
    """List every cross-validation."""
    found = []
    for seed in range(seeds):
        for marker, mode in (("idh", "MIX"), ("idh", "IMG"), ("mgmt", "MIX")):
            found.append(Job(f"{marker}_{mode}", marker, "idh", {"mode": mode, "metadata": False}, seed))
    for switches in itertools.product((False, True), repeat=3):
        names = "".join(str(int(switch)) for switch in switches)
        options = dict(zip(("multi_scale", "merge_in", "metadata"), switches, strict=True))
        found.append(Job(f"kinet_{names}", "ki67", "kinet", options, 0))
    return found


def prepare(out: Path, n_patients: int, epochs: int, cohort_seed: int) -> RunConfig:
    """Write the synthetic cohort and preprocess it; return the configuration."""
    with make_progress() as progress:
        sheet = write_synthetic_cohort(
            out / "cohort", n_patients, cohort_seed, size_px=SIZE_PX, missing_t1ce_fraction=0.0, progress=progress
        )
    config = parse_config(
        {
            "cohort": {"sheet": str(sheet.resolve()), "sequences": ["t1ce", "flair"]},
            "preprocess": {"crop_size_px": SIZE_PX, "image_size_px": SIZE_PX, "workers": 1},
            "folds": {"n_folds": 3, "stratify_by": ["idh", "mgmt", "ki67"]},
            "classify": {
                "masks": "expert",
                "epochs": epochs,
                "learning_rate": 2e-3,
                "slices_per_case": 4,
                "image_size_px": 48,
                "markers": MARKERS,
            },
        },
        source="benchmark",
        folder=out,
    )
    Pipeline(config, out / "run", Silent()).run(["preprocess"])
    return config


def cross_validate(job: Job, cases: list[MarkerCase], cohort: PreparedCohort, config: RunConfig, folder: Path) -> Any:
    """Return one row a patient; folds that are finished are read back."""
    marker = config.classify.markers[job.marker]
    evaluator = build_evaluator(job.classifier, classifier_settings(config.classify, marker), job.options)
    frame = evaluator.cross_validate(
        cases, cohort.folds, folder=folder, seed=derive_seed(job.seed, "evidence"), label=job.name, tune=False
    )
    return patient_level(frame)


def main() -> None:
    """Run everything and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pool", type=Path, nargs="+", help="folders of finished evidence, one for each cohort")
    parser.add_argument("--patients", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--cohort-seed", type=int, default=0, help="another one draws other patients")
    parser.add_argument("--only", choices=("idh", "mgmt", "kinet"), nargs="+", help="these questions alone")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.pool is None):
        parser.error("give --out, or --pool with folders that --out has filled")
    if arguments.pool is not None:
        pool(arguments.pool, arguments.seeds)
        return
    config = prepare(arguments.out, arguments.patients, arguments.epochs, arguments.cohort_seed)
    cohort = PreparedCohort.load(arguments.out / "run" / "preprocess")
    # Finished folds are read back, so the folder must not be of other settings or slices.
    record = arguments.out / "jobs" / "settings.json"
    settings = {
        "classify": config.classify.model_dump(mode="json"),
        "slices": sha256_file(arguments.out / "run" / "preprocess" / MANIFEST),
    }
    if record.is_file() and read_json(record) != settings:
        parser.error(f"{record.parent} holds evidence of other settings; delete it or choose another --out")
    write_json(record, settings)
    masks = mask_source(config, None)
    cases = {
        name: cut_cases(config, cohort, plan_marker(config, cohort, masks, name, config.classify.markers[name]))
        for name in MARKERS
    }
    idh = {case.patient_id: str(case.labels["idh"]) for case in cohort.cases.values()}
    found: dict[tuple[str, int], pd.DataFrame] = {}
    rows = []
    wanted = [
        job for job in jobs(arguments.seeds) if arguments.only is None or job.name.split("_")[0] in arguments.only
    ]
    with make_progress() as progress, progress.task("cross-validations", len(wanted)) as task:
        for job in wanted:
            started = time.process_time()
            patients = cross_validate(
                job, cases[job.marker], cohort, config, arguments.out / "jobs" / f"{job.name}_seed{job.seed}"
            )
            found[job.name, job.seed] = patients
            rows.append(figures(job, patients, idh) | {"cpu_s": round(time.process_time() - started)})
            task.advance()
            progress.note(line(rows[-1]))
    write_text(arguments.out / "evidence.csv", pd.DataFrame(rows).to_csv(index=False))
    for row in rows:
        print(line(row))
    for name in sorted({job.name for job in wanted if job.classifier == "idh"}):
        patients = mean_over_seeds(found, name, arguments.seeds)
        print(line(figures(Job(f"{name}, seeds averaged", "", "", {}, -1), patients, idh)))
    if ("idh_MIX", 0) not in found:
        return
    gaps = []
    for seed in range(arguments.seeds):
        mix, image = found["idh_MIX", seed], found["idh_IMG", seed]
        gap = paired_delong(mix["label"], mix["probability"], image["probability"])
        gaps.append(gap.difference)
        print(f"MIX minus IMG, seed {seed}: {gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
    print(f"mean over {len(gaps)} seeds {np.mean(gaps):+.3f}; MIX is better in {sum(gap > 0 for gap in gaps)}")
    mix, image = (mean_over_seeds(found, name, arguments.seeds) for name in ("idh_MIX", "idh_IMG"))
    gap = paired_delong(mix["label"], mix["probability"], image["probability"])
    print(f"MIX minus IMG, seeds averaged: {gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")


def pool(folders: list[Path], seeds: int) -> None:
    """Print what several cohorts say together: means over cohorts with Student's interval, a cohort being one draw."""
    within: dict[str, list[float]] = {"idh_MIX": [], "idh_IMG": [], "mgmt_MIX": []}
    gaps, better, every, paired = [], 0, [], []
    for folder in folders:
        sheet = pd.read_csv(folder / "cohort" / "cohort.csv", dtype=str).set_index("patient_id")["idh"]
        status = {str(patient): str(value) for patient, value in sheet.items()}
        found = {(name, seed): _stored(folder, name, seed) for name in within for seed in range(seeds)}
        averaged = {name: mean_over_seeds(found, name, seeds) for name in within}
        for name, patients in averaged.items():
            row = figures(Job(name, "", "", {}, -1), patients, status)
            print(folder.name, line(row))
            within[name].append(row.get("auc_same_idh", row["auc"]))
        mgmt = averaged["mgmt_MIX"]
        groups = [f"{folder.name} {status[patient]}" for patient in mgmt["patient_id"]]
        every.append(mgmt.assign(group=groups))
        own = [
            auc(found["idh_MIX", seed]["label"], found["idh_MIX", seed]["probability"])
            - auc(found["idh_IMG", seed]["label"], found["idh_IMG", seed]["probability"])
            for seed in range(seeds)
        ]
        mix, image = averaged["idh_MIX"], averaged["idh_IMG"]
        paired.append(paired_delong(mix["label"], mix["probability"], image["probability"]))
        better += sum(gap > 0 for gap in own)
        gaps.append(float(np.mean(own)))
        print(folder.name, "MIX minus IMG by seed:", ", ".join(f"{gap:+.3f}" for gap in own))
    print(f"{len(folders)} cohorts; means over cohorts with Student's 95 % interval:")
    print("  IDH, MIX:", _student(within["idh_MIX"]))
    print("  IDH, IMG:", _student(within["idh_IMG"]))
    print(f"  MIX minus IMG: {_student(gaps)}; MIX is better in {better} of {len(folders) * seeds} trainings")
    # Patients of different cohorts are independent: weights are the inverse of DeLong's variances.
    weights = np.asarray([(item.high - item.low) ** -2.0 for item in paired])
    mean = float(np.average([item.difference for item in paired], weights=weights))
    half = float(0.5 / np.sqrt(weights.sum()))
    print(f"  the same of averaged seeds, DeLong's variances: {mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})")
    print("  MGMT among patients of the same IDH status:", _student(within["mgmt_MIX"]))
    patients = pd.concat(every)
    for words, groups in (
        ("the same over all pairs", patients["group"]),
        ("and of the same test fold", patients["group"] + " " + patients["fold"].astype(str)),
    ):
        whole = auc_within(patients["label"], patients["probability"], groups.tolist())
        low, high = bootstrap_interval(
            patients["label"],
            [patients["probability"], groups],
            auc_within,
            samples=DRAWS,
            generator=numpy_generator(0, "evidence"),
        )
        print(f"  {words}: {whole:.3f} ({low:.3f} to {high:.3f}, bootstrap over {len(patients)} patients)")


def _stored(folder: Path, name: str, seed: int) -> pd.DataFrame:
    files = sorted((folder / "jobs" / f"{name}_seed{seed}").glob("fold*/predictions.csv"))
    if not files:
        raise SystemExit(f"{folder}: holds no {name} of seed {seed}; run --out {folder} to its end first")
    rows = pd.concat([pd.read_csv(file, dtype={"case_id": str, "patient_id": str}) for file in files])
    folds = load_folds(folder / "run" / "preprocess" / "folds.json")
    if set(rows["case_id"]) != {case for fold in range(folds.n) for case in folds.test(fold)}:
        raise SystemExit(f"{folder}: {name} of seed {seed} is not finished; run --out {folder} to its end first")
    return patient_level(rows)


def _student(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}, one cohort has no interval"
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def mean_over_seeds(found: Mapping[tuple[str, int], pd.DataFrame], name: str, seeds: int) -> pd.DataFrame:
    """Return the patients of one job with the probability averaged over seeds."""
    first = found[name, 0]
    return first.assign(probability=np.mean([found[name, seed]["probability"] for seed in range(seeds)], axis=0))


def figures(job: Job, patients: pd.DataFrame, idh: Mapping[str, str]) -> dict[str, Any]:
    """Return the AUC with its interval; of MGMT also the one over pairs of patients with the same IDH status."""
    whole = delong(patients["label"], patients["probability"])
    row: dict[str, Any] = {"job": job.name, "seed": job.seed, "n": whole.n, "n_positive": whole.n_positive}
    row |= {"auc": whole.value, "auc_low": whole.low, "auc_high": whole.high}
    row["auc_within_folds"] = auc_within(patients["label"], patients["probability"], patients["fold"].tolist())
    if job.name.startswith("mgmt"):
        status = np.asarray([idh[patient] for patient in patients["patient_id"]])
        low, high = bootstrap_interval(
            patients["label"],
            [patients["probability"], status],
            auc_within,
            samples=DRAWS,
            generator=numpy_generator(0, "evidence"),
        )
        same = auc_within(patients["label"], patients["probability"], status.tolist())
        row |= {"auc_same_idh": same, "auc_same_idh_low": low, "auc_same_idh_high": high}
        row["auc_of_idh_itself"] = auc(patients["label"], status == "mutant")
    return row


def line(row: Mapping[str, Any]) -> str:
    """Say one row in words."""
    text = (
        f"{row['job']:24s} seed {row['seed']:2d}  AUC {row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})"
    )
    text += f", within folds {row['auc_within_folds']:.3f}, n = {row['n']}, {row['n_positive']} positive"
    if "auc_same_idh" in row:
        text += (
            f"; same IDH {row['auc_same_idh']:.3f} ({row['auc_same_idh_low']:.3f} to {row['auc_same_idh_high']:.3f}), "
            f"IDH itself {row['auc_of_idh_itself']:.3f}"
        )
    return text + (f"; {row['cpu_s']} s CPU" if "cpu_s" in row else "")


if __name__ == "__main__":
    main()
