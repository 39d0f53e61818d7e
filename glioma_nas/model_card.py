"""Say in one page what an exported network is, what it was trained on, how it was checked, and what it is not for.

Reference: Mitchell et al., Model Cards for Model Reporting, FAT* 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        network: Name in the run.
        architecture: Id of the architecture record; empty for a baseline.
        sequences: Channels of the input, in order.
        image_size_px: Side of the slices.
        n_train: Patients it was trained on.
        n_folds: Folds of the run; the weights are those of fold 0.
        params_m: Parameters, millions.
        macs_g: Multiply-accumulate operations of a slice, 10⁹.
        latency: Median and 95th percentile in ms, number of calls, and the conditions in words.
        files: File → figures of its comparison with PyTorch, or why it was not compared.
    """

    network: str
    architecture: str
    sequences: Sequence[str]
    image_size_px: int
    n_train: int
    n_folds: int
    params_m: float
    macs_g: float
    latency: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]


def model_card(facts: CardFacts) -> str:
    """Render the card as Markdown."""
    origin = f"architecture `{facts.architecture}`, found by search" if facts.architecture else "a baseline"
    side, latency = facts.image_size_px, facts.latency
    lines = [
        f"# {facts.network}",
        "",
        "Outlines glioma on axial MRI slices. **Research use only; not a medical device.** Its masks do not replace a "
        "radiologist's, and nothing it shows replaces a tissue diagnosis.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {origin} |",
        f"| input | float32 (N, {len(facts.sequences)}, {side}, {side}): {', '.join(facts.sequences)}; each with "
        "mean 0 and variance 1 inside the brain, 0 outside |",
        f"| output | logits (N, 2, {side}, {side}): background, tumour; the larger one is the mask |",
        f"| parameters | {facts.params_m:.3f} million |",
        f"| work for a slice | {facts.macs_g:.3f} ·10⁹ multiply-accumulate operations |",
        f"| time for a slice | {latency['median_ms']:.2f} ms, 95th percentile {latency['p95_ms']:.2f} ms, "
        f"n = {latency['n']}; {latency['conditions']} |",
        f"| trained on | {facts.n_train} patients: the training patients of fold 0 of {facts.n_folds} |",
        "",
        "## Files",
        "",
        "Compared with PyTorch on real slices of patients that it was not trained on; a file beyond tolerance is not "
        "written.",
        "",
        "| file | largest logit difference | Dice of the masks | tumour pixels | slices |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in facts.files.items():
        if "not_compared" in row:
            lines.append(f"| {name} | not compared: {row['not_compared']} | | | |")
        else:
            lines.append(
                f"| {name} | {row['max_abs_logit_difference']:.2g} | {row['mask_dice']:.5f} | {row['tumour_px']} "
                f"| {row['n_slices']} |"
            )
    reduced = {name: row for name, row in facts.files.items() if "expert_dice" in row}
    if reduced:
        lines += ["", "What fewer bits cost, by the Dice with the experts' masks, a mean over cases:", ""]
        lines += ["| file | Dice | PyTorch, float32 | test cases |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {row['expert_dice']:.4f} | {row['expert_dice_float32']:.4f} | {row['n_cases']} |"
            for name, row in reduced.items()
        ]
    lines += [
        "",
        "## Limits",
        "",
        "- How well it outlines tumours is in the report of the run, out-of-fold by patient; these weights alone have "
        "been tested on fold 0's test patients only.",
        "- Scanners, sequences, resolutions and tumour types that the cohort lacks were never seen.",
        "- It expects the preprocessing of the run: co-registered, skull-stripped, normalised, of this size.",
        "",
    ]
    return "\n".join(lines)
