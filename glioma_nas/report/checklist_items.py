"""The items of two reporting guidelines, in our own words, and which of a run's facts answers each.

``answer`` names an entry of `glioma_nas.report.checklists.evidence`; an item without one is for the authors to write,
and ``hint`` says what of. Numbers are those of the guidelines, whose full wording is in the papers. They were compared
item by item, on 24 November 2026, with copies of both lists in public repositories, and not with the papers themselves,
which cannot be reached from where this is tested.

References:
    CLAIM 2024: Tejani et al., Radiology: Artificial Intelligence 6(4):e240300 (2024), doi 10.1148/ryai.240300.
    TRIPOD+AI: Collins et al., BMJ 385:e078378 (2024), doi 10.1136/bmj-2023-078378.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One item of a checklist.

    Attributes:
        number: As in the guideline.
        part: Part of the article.
        topic: What is asked for.
        answer: Key of the evidence; empty for what only the authors know.
        hint: What the authors have to write, or add to the evidence.
    """

    number: str
    part: str
    topic: str
    answer: str = ""
    hint: str = ""


_DATA, _REFERENCE, _SPLIT, _MODEL = (
    "Methods, data",
    "Methods, reference standard",
    "Methods, partitions",
    "Methods, model",
)
_TRAINING, _EVALUATION, _RESULTS = "Methods, training", "Methods, evaluation", "Results"

CLAIM_2024: tuple[Item, ...] = (
    Item("1", "Title", "title or abstract names AI and the kind of technique", hint="for example: deep learning"),
    Item("2", "Abstract", "abstract with design, methods, results and conclusion", hint="write it last"),
    Item("3", "Introduction", "background, and what the AI is meant to be used for", hint="see docs: clinical limits"),
    Item("4", "Introduction", "aims and hypotheses", hint="say which comparison was planned beforehand"),
    Item(
        "5",
        "Methods, design",
        "whether data were gathered before or after the study began",
        hint="the sheet does not say",
    ),
    Item("6", "Methods, design", "kind of study: building, testing, feasibility, non-inferiority", hint="name it"),
    Item(
        "7", _DATA, "where the scans and labels come from", hint="institutions, dates, public collections and licences"
    ),
    Item("8", _DATA, "who was eligible and who was left out", "flow", "add how patients were found"),
    Item("9", _DATA, "what was done to the images before the network", "preprocessing"),
    Item("10", _DATA, "which parts of the data were used, such as slices", "subsets"),
    Item(
        "11", _DATA, "how patients were made unrecognisable", "deidentification", "and what was done before the sheet"
    ),
    Item("12", _DATA, "how missing sequences, labels, age and sex were treated", "missing_data"),
    Item("13", _DATA, "how scans were acquired: scanner, sequence, resolution", "grids", "add scanners and protocols"),
    Item(
        "14", _REFERENCE, "what the reference standard is and how it was obtained", hint="masks; assays of the markers"
    ),
    Item("15", _REFERENCE, "why this reference was chosen", hint="also what it gets wrong"),
    Item(
        "16", _REFERENCE, "who drew the masks, with which training and tools", hint="number and experience of readers"
    ),
    Item("17", _REFERENCE, "how the test patients were annotated", hint="whether readers saw the network's outline"),
    Item(
        "18",
        _REFERENCE,
        "how far readers agree with each other and themselves",
        hint="two readers on part of the cases",
    ),
    Item("19", _SPLIT, "how patients were assigned to training and test", "folds"),
    Item("20", _SPLIT, "at which level training and test are apart", "patient_level"),
    Item(
        "21", "Methods, test data", "intended number of patients and why", hint="the run gives intervals, no planning"
    ),
    Item("22", _MODEL, "the network: inputs, outputs, every layer", "architecture"),
    Item("23", _MODEL, "software with versions", "software"),
    Item("24", _MODEL, "how weights were initialised", "initialisation"),
    Item("25", _TRAINING, "augmentation, loss, optimiser, epochs, batch size", "training"),
    Item("26", _TRAINING, "how the final model was chosen", "model_selection"),
    Item("27", _TRAINING, "whether and how models are combined", "ensembling"),
    Item("28", _EVALUATION, "figures of performance and why these", "metrics"),
    Item("29", _EVALUATION, "intervals and tests", "uncertainty"),
    Item("30", _EVALUATION, "how results change with other seeds, settings or disturbed inputs", "robustness"),
    Item("31", _EVALUATION, "what shows where a prediction comes from, and how that was checked", "explanation"),
    Item("32", _EVALUATION, "test on patients of the same source", "internal"),
    Item("33", _EVALUATION, "test on patients from elsewhere", "external"),
    Item("34", _EVALUATION, "registration of the trial, if it is one", hint="number and registry, or: not a trial"),
    Item("35", _RESULTS, "how many patients were included and excluded", "flow"),
    Item("36", _RESULTS, "age, sex and disease in each partition", "demographics"),
    Item("37", _RESULTS, "performance with its uncertainty", "performance"),
    Item("38", _RESULTS, "diagnostic figures with their precision", "diagnostic"),
    Item("39", _RESULTS, "an analysis of the failures", "failures", "say what they have in common"),
    Item("40", "Discussion", "limits of the study", "limits", "add those of your data and design"),
    Item("41", "Discussion", "what it means for practice and who should use it", hint="research use only as it stands"),
    Item(
        "42", "Other", "where protocol and further technical detail are found", hint="link the protocol and config.yaml"
    ),
    Item(
        "43",
        "Other",
        "whether software, trained model and data can be had",
        hint="link code, weights, and what may be shared",
    ),
    Item("44", "Other", "funding and the part the funders had", hint="or: none"),
)

TRIPOD_AI: tuple[Item, ...] = (
    Item("1", "Title", "title says: developing or evaluating a model, whom for, which outcome", hint="write it last"),
    Item("2", "Abstract", "abstract by TRIPOD+AI for Abstracts", hint="write it last"),
    Item("3a", "Introduction", "the medical question, and models that exist", hint="cite what the model would replace"),
    Item(
        "3b", "Introduction", "whom the model is for, at which point of care, and who uses it", hint="research so far"
    ),
    Item(
        "3c",
        "Introduction",
        "known inequalities between groups of patients",
        hint="access to MRI and to molecular tests",
    ),
    Item("4", "Introduction", "aims: development, evaluation or both", hint="a run is both: out-of-fold"),
    Item(
        "5a",
        "Methods",
        "sources of the data, for development and evaluation",
        hint="and how far they are representative",
    ),
    Item("5b", "Methods", "dates of collection", hint="first and last scan"),
    Item("6a", "Methods", "setting, number and place of the centres", "sites", "name the centres"),
    Item("6b", "Methods", "who was eligible", "flow", "add how patients were found"),
    Item("6c", "Methods", "treatment before the scan", hint="surgery, steroids or biopsy before imaging"),
    Item(
        "7", "Methods", "preparation and quality checks of the data, and whether alike in all groups", "preprocessing"
    ),
    Item("8a", "Methods", "the outcome and how it was determined", "outcome", "name the assays"),
    Item("8b", "Methods", "who judged an outcome that needs judgement", hint="for example of Ki67 counts"),
    Item("8c", "Methods", "whether the judges knew the predictors", hint="pathology blinded to imaging or not"),
    Item("9a", "Methods", "which predictors were considered and why", "predictors"),
    Item(
        "9b",
        "Methods",
        "definition of each predictor and when it is measured",
        "predictors",
        "add time from scan to tissue",
    ),
    Item("9c", "Methods", "who judged a predictor that needs judgement", hint="none if masks are the network's"),
    Item("10", "Methods", "sample size and its reasons", hint="the run gives intervals, no planning"),
    Item("11", "Methods", "missing data", "missing_data"),
    Item("12a", "Methods", "how data were split for development and evaluation", "folds"),
    Item("12b", "Methods", "how predictors enter: scaling, encoding", "preprocessing"),
    Item("12c", "Methods", "kind of model, every step of building, tuning and internal validation", "training"),
    Item("12d", "Methods", "how differences between centres were handled", "sites"),
    Item("12e", "Methods", "figures and plots of performance", "metrics"),
    Item("12f", "Methods", "re-calibration or other updating", "recalibration"),
    Item("12g", "Methods", "how predictions are computed in the evaluation", "ensembling"),
    Item("13", "Methods", "class imbalance, and what was done about it", "imbalance"),
    Item("14", "Methods", "what was done for fairness", "fairness", "say which groups matter and why"),
    Item("15", "Methods", "what the model gives out, and how thresholds were chosen", "thresholds"),
    Item("16", "Methods", "differences between development and evaluation data", "partitions_differ"),
    Item("17", "Methods", "ethics approval and consent", hint="committee, number; or why none was needed"),
    Item("18a", "Open science", "funding", hint="or: none"),
    Item("18b", "Open science", "conflicts of interest", hint="of every author"),
    Item("18c", "Open science", "where the protocol is", hint="or: none was written"),
    Item("18d", "Open science", "registration", hint="or: not registered"),
    Item("18e", "Open science", "who can have the data", hint="and under which terms"),
    Item("18f", "Open science", "who can have the code", hint="link it, with the version in methods.md"),
    Item("19", "Patients", "what patients and the public contributed", hint="or: they were not involved"),
    Item("20a", "Results", "flow of patients, with and without the outcome", "flow"),
    Item("20b", "Results", "characteristics of the patients, with missing values", "demographics"),
    Item("20c", "Results", "comparison of predictors between development and evaluation", "partitions_differ"),
    Item("21", "Results", "patients and events in every analysis", "events"),
    Item(
        "22", "Results", "the full model, so that others can predict with it", "architecture", "say where weights are"
    ),
    Item("23a", "Results", "performance with intervals, also in groups", "diagnostic"),
    Item("23b", "Results", "how performance differs between centres", "sites"),
    Item("24", "Results", "results of updating", "recalibration"),
    Item("25", "Discussion", "what the results mean, fairness included", hint="against the baselines in the report"),
    Item("26", "Discussion", "limits", "limits", "add those of your data and design"),
    Item("27a", "Discussion", "what to do with bad or missing input in use", "bad_input"),
    Item(
        "27b",
        "Discussion",
        "what the user has to do and to know",
        hint="who checks the outline before markers are read",
    ),
    Item("27c", "Discussion", "next steps, and for whom it may hold", hint="see docs: clinical limits"),
)
