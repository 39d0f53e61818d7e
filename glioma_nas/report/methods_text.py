"""What an article's methods section would say about a run: written from its configuration and records, with citations.

Only what the run did is said. What it cannot know (where patients came from, who drew the masks) is left to the authors
and marked in brackets.
"""

from __future__ import annotations

from glioma_nas.config import RunConfig
from glioma_nas.report.cohort_section import missing_rule
from glioma_nas.report.document import plural
from glioma_nas.report.records import RunRecords
from glioma_nas.report.segmentation_section import device

_CITATIONS = {
    "pytorch": "Paszke A. et al. PyTorch: an imperative style, high-performance deep learning library. NeurIPS 2019.",
    "monai": "Cardoso M. J. et al. MONAI: an open-source framework for deep learning in healthcare. arXiv:2211.02701, "
    "2022.",
    "nni": "Microsoft, Neural Network Intelligence, https://github.com/microsoft/nni.",
    "darts": "Liu H., Simonyan K., Yang Y. DARTS: differentiable architecture search. ICLR 2019.",
    "fasterseg": "Chen W. et al. FasterSeg: searching for faster real-time semantic segmentation. ICLR 2020.",
    "focal": "Lin T.-Y. et al. Focal loss for dense object detection. ICCV 2017.",
    "distillation": "Hinton G., Vinyals O., Dean J. Distilling the knowledge in a neural network. "
    "arXiv:1503.02531, 2015.",
    "n4": "Tustison N. et al. N4ITK: improved N3 bias correction. IEEE Trans Med Imaging 29 (2010) 1310-1320.",
    "nyul": "Nyúl L. G., Udupa J. K., Zhang X. New variants of a method of MRI scale standardization. IEEE Trans Med "
    "Imaging 19 (2000) 143-150.",
    "deepbet": "Fisch L. et al. deepbet: fast brain extraction of T1-weighted MRI using convolutional neural networks. "
    "Comput Biol Med 179 (2024) 108845.",
    "hd_bet": "Isensee F. et al. Automated brain extraction of multisequence MRI using artificial neural networks. Hum "
    "Brain Mapp 40 (2019) 4952-4964.",
    "synthstrip": "Hoopes A. et al. SynthStrip: skull-stripping for any brain image. NeuroImage 260 (2022) 119474.",
    "dice": "Dice L. R. Measures of the amount of ecologic association between species. Ecology 26 (1945) 297-302.",
    "bootstrap": "Efron B., Tibshirani R. An introduction to the bootstrap. Chapman & Hall, 1993.",
    "delong": "DeLong E. R., DeLong D. M., Clarke-Pearson D. L. Comparing the areas under two or more correlated ROC "
    "curves. Biometrics 44 (1988) 837-845.",
    "holm": "Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 6 (1979) 65-70.",
    "temperature": "Guo C. et al. On calibration of modern neural networks. ICML 2017.",
    "gradcam": "Selvaraju R. R. et al. Grad-CAM: visual explanations from deep networks. ICCV 2017.",
    "sanity": "Adebayo J. et al. Sanity checks for saliency maps. NeurIPS 2018.",
    "who": "Louis D. N. et al. The 2021 WHO classification of tumors of the central nervous system. Neuro-Oncology 23 "
    "(2021) 1231-1251.",
    "claim": "Tejani A. S. et al. Checklist for artificial intelligence in medical imaging (CLAIM): 2024 update. "
    "Radiol Artif Intell 6 (2024) e240300.",
    "tripod": "Collins G. S. et al. TRIPOD+AI statement. BMJ 385 (2024) e078378.",
}
_STEPS = {
    "orient": "turned to one orientation",
    "register": "registered rigidly within each patient",
    "same_grid": "resampled to one grid",
    "strip_deepbet": "skull-stripped with deepbet",
    "strip_template": "skull-stripped by registration to a template",
    "strip_hd_bet": "skull-stripped with HD-BET",
    "strip_synthstrip": "skull-stripped with SynthStrip",
    "already_stripped": "checked to be skull-stripped",
    "n4": "corrected for bias fields (N4)",
    "resample": "resampled",
    "percentile": "clipped and scaled by percentiles",
    "nyul": "scaled to intensity landmarks (Nyúl)",
    "zscore": "normalised to mean 0 and variance 1 inside the brain, sequence by sequence",
    "crop_pad": "cropped or padded to a square around the brain",
    "resize": "resized",
}
_STEP_CITATIONS = {
    "n4": "n4",
    "nyul": "nyul",
    "strip_deepbet": "deepbet",
    "strip_hd_bet": "hd_bet",
    "strip_synthstrip": "synthstrip",
}


class _References:
    """Numbers citations in the order in which the text comes to them."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, *keys: str) -> str:
        for key in keys:
            if key not in self.keys:
                self.keys.append(key)
        return f" [{', '.join(str(self.keys.index(key) + 1) for key in keys)}]"

    def listed(self) -> list[str]:
        return [f"{number}. {_CITATIONS[key]}" for number, key in enumerate(self.keys, 1)]


def methods_text(records: RunRecords, config: RunConfig) -> str:
    """Return the text as Markdown: a paragraph a topic, then the references."""
    cite = _References()
    paragraphs = [
        _patients(records, config),
        _images(config, cite),
        _search(records, config, cite),
        _training(records, config, cite),
        _evaluation(records, config, cite),
        *_markers(records, config, cite),
        _software(records, config, cite),
        f"Reporting follows CLAIM 2024 and TRIPOD+AI{cite('claim', 'tripod')}; the checklists come with the run.",
    ]
    head = [
        "# Methods",
        "",
        "Written from the configuration and the records of the run. Brackets mark what only the authors know. Check "
        "every sentence before you use it.",
        "",
    ]
    body = [line for paragraph in paragraphs for line in (paragraph, "")]
    return "\n".join([*head, *body, "## References", "", *cite.listed(), ""])


def _patients(records: RunRecords, config: RunConfig) -> str:
    cohort = records.cohort
    patients = plural(len({case.patient_id for case in cohort.cases.values()}), "patient")
    with_mask = sum(case.has_mask for case in cohort.cases.values())
    return (
        f"**Patients.** {patients} with {plural(len(cohort.cases), 'examination')} were analysed and "
        f"{plural(len(cohort.excluded), 'examination')} left out; {with_mask} had an expert mask of the whole tumour "
        "[who were the patients, where and when were they scanned, who drew the masks, which ethics committee "
        f"approved]. Sequences were {', '.join(config.cohort.sequences)}. When an examination lacked one: "
        f"{missing_rule(config)}."
    )


def _images(config: RunConfig, cite: _References) -> str:
    said = []
    for name in config.preprocess.steps:
        words = _STEPS.get(name, f"processed by the step '{name}'")
        said.append(words + (cite(_STEP_CITATIONS[name]) if name in _STEP_CITATIONS else ""))
    size = config.preprocess.image_size_px
    slices = {"all": "all slices", "brain": "slices with brain", "tumour": "slices with tumour"}
    return (
        f"**Images.** Scans were {'; '.join(said)}. Networks saw axial slices of {size} × {size} pixels; training used "
        f"{slices[config.preprocess.training_slices]}, prediction every slice."
    )


def _search(records: RunRecords, config: RunConfig, cite: _References) -> str:
    search, results = config.search, records.manifests.get("search", {}).get("results", {})
    if "search" not in records.manifests:
        return "**Architecture search.** Not done."
    fold = results.get("search_fold")
    where = "" if fold is None else f", on the training patients of fold {fold} only"
    history = records.search_history
    differentiable = history is not None and "loss_architecture_student" in history.columns
    return (
        f"**Architecture search.** Teacher and student were searched in the space '{search.space}' with the strategy "
        f"'{search.strategy}'{cite('darts', 'fasterseg') if differentiable else ''} on NNI{cite('nni')}{where}: "
        f"{plural(search.pretrain_epochs, 'epoch')} of weights alone, then {plural(search.search_epochs, 'epoch')} of "
        f"search, learning rate {search.learning_rate:g}, batches of {search.batch_size}, latency weight "
        f"{search.latency_weight:g} per millisecond of latency measured operator by operator. Weights were drawn at "
        "random from the run's seed."
    )


def _training(records: RunRecords, config: RunConfig, cite: _References) -> str:
    train = config.train
    if not records.train_histories:
        return "**Training.** Not done."
    loss = {"focal": "focal loss", "dice_ce": "Dice plus cross-entropy loss", "ohem": "hard-example cross-entropy"}
    distilled = (
        f" The student also learnt from the teacher (weight {train.kd_weight:g}, temperature "
        f"{train.kd_temperature:g}){cite('distillation')}."
        if train.kd_weight
        else ""
    )
    named = loss.get(train.loss, train.loss) + (cite("focal") if train.loss == "focal" else "")
    kept = "the last epoch's" if train.checkpoint == "last" else "those of the best epoch on validation patients"
    baselines = f" Baselines {', '.join(train.baselines)} had the same folds and budget." if train.baselines else ""
    augmented = "Slices were augmented." if train.augment else "Slices were not augmented."
    return (
        f"**Training.** Derived networks were trained from scratch in every fold for {plural(train.epochs, 'epoch')} "
        f"({'every slice once an epoch' if train.steps_per_epoch is None else f'{train.steps_per_epoch} steps each'}), "
        f"{named}, batches of {train.batch_size}, learning rate {train.learning_rate:g}, weight decay "
        f"{train.weight_decay:g}. {augmented} Weights kept are {kept}.{distilled}{baselines}"
    )


def _evaluation(records: RunRecords, config: RunConfig, cite: _References) -> str:
    folds = records.cohort.folds
    latency = f" Latency was measured on {device(records)}." if records.latency else ""
    return (
        f"**Evaluation.** {folds.n} folds were drawn by patient (seed {folds.seed}, hash "
        f"{folds.hash[:16]}); no patient and no identical scan stands on both sides. Every figure is out-of-fold. "
        f"Outlines were scored on each scan's own grid by Dice{cite('dice')} and by the 95th percentile of "
        "the surface distance (HD95), which does not "
        "exist where a mask is empty and is then left out; intervals are 95 % percentile bootstraps over "
        f"patients{cite('bootstrap')}.{latency}"
    )


def _markers(records: RunRecords, config: RunConfig, cite: _References) -> list[str]:
    classify = config.classify
    measured = [name for name, found in records.markers.items() if found.metrics]
    if not measured:
        return []
    said = []
    for name in measured:
        marker = classify.markers[name]
        rule = f"'{marker.positive}'" if marker.positive is not None else f"at least {marker.threshold:g}"
        said.append(
            f"{name} ({marker.column} {rule} is positive) with the classifier '{marker.classifier}' from "
            f"{', '.join(marker.sequences)}"
        )
    text = (
        f"**Markers.** {'; '.join(said)}. Classifiers saw up to {plural(classify.slices_per_case, 'axial slice')} a "
        f"case with the largest tumour, {classify.image_size_px} pixels wide, with masks by: {classify.masks}, and "
        f"were trained for {plural(classify.epochs, 'epoch')} [how the markers were determined in tissue]. Threshold "
        f"and temperature{cite('temperature')} were chosen on {classify.inner_folds} inner folds of the "
        "training patients. "
        f"AUCs have DeLong intervals{cite('delong')}, are compared with baselines "
        f"({', '.join(classify.baselines) or 'none'}) by paired DeLong tests corrected by Holm{cite('holm')}."
    )
    if any(found.pictures for found in records.markers.values()):
        text += f" Grad-CAM maps{cite('gradcam')} are checked against randomised weights{cite('sanity')}."
    if classify.subtype is not None:
        text += (
            f" Markers were integrated by the rules '{classify.subtype.rules}' of WHO CNS5{cite('who')}; nothing is "
            f"called below a probability of {classify.subtype.tau:g}. That is no integrated diagnosis, which needs "
            "tissue."
        )
    return [text]


def _software(records: RunRecords, config: RunConfig, cite: _References) -> str:
    recorded = [manifest["versions"] for manifest in records.manifests.values() if manifest.get("versions")]
    shown = ", ".join(f"{name} {value}" for name, value in recorded[-1].items()) if recorded else "not recorded"
    return (
        f"**Software.** {shown}; PyTorch, MONAI and NNI{cite('pytorch', 'monai', 'nni')}; seed {config.seed}, device "
        f"{config.device}."
    )
