"""Deliver a network as a MONAI bundle: metadata, weights, the network as a torch.export program, and how to run it.

``python -m monai.bundle run`` outlines tumours in prepared volumes with ``configs/inference.json``, without this
project: the program in ``models/model.pt2`` takes the weights in ``models/model.pt``. It does without MONAI's
evaluator, which puts networks into evaluation mode; a program of torch.export is in it for good and refuses.

MONAI's ``verify_metadata`` checks ``configs/metadata.json`` without a network connection when it is given the schema
beside it as ``--filepath``. That schema is ours, written from MONAI's description of the fields; MONAI's own lies on
its server, at the address in the metadata's ``schema``, and is in none of its packages.

Reference: MONAI bundle specification, https://docs.monai.io/en/stable/mb_specification.html.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glioma_nas import __version__
from glioma_nas.files import atomic_path, write_json, write_text

_SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
SCHEMA_FILE = "bundle_schema.json"
CLASS_NAMES = ("background", "tumour")


_README = """
## This bundle

    python -m monai.bundle run --config_file configs/inference.json --dataset_dir CASES --output_dir MASKS

in the bundle's folder outlines tumours (needs `pip install monai fire nibabel`). `CASES` holds a folder for each case
with {files}: co-registered, skull-stripped, normalised to mean 0 and variance 1 inside the brain and 0 outside, axial
slices of the pixel size the network was trained with. Slices are padded with 0 or cropped to {side}×{side}. Masks are
written on the grid of the first sequence. It runs on the CPU.

`models/model.pt` is the state dict; `models/model.pt2` the network itself as a torch.export program, which needs no
code of ours; the architecture record in `configs/metadata.json` lets glioma_nas build it as a module.

    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath configs/schema.json

checks the metadata (needs `pip install jsonschema` as well) against `configs/schema.json`. **That schema is written by
glioma_nas, not by MONAI**, from the fields that the bundle specification lists as mandatory; MONAI's own is at the
address in the metadata, and without `--filepath configs/schema.json` MONAI fetches it from there.
"""

_LICENCE = """Configuration files, schema and network definition: Apache License 2.0, see
https://www.apache.org/licenses/LICENSE-2.0

The weights in models/ (model.pt, model.pt2) belong to whoever trained them. No licence to them is given here: state one
in this file before you pass them on, and make sure that the consent of the patients they were trained on allows it.
"""


def write_bundle(
    folder: Path,
    *,
    program: Path,
    weights: Mapping[str, Tensor],
    card: str,
    name: str,
    sequences: Sequence[str],
    image_size_px: int,
    architecture: Mapping[str, Any],
) -> None:
    """Write a bundle.

    Args:
        folder: The bundle's folder; made if need be.
        program: The network as ``torch.export`` saved it.
        weights: Its state dict.
        card: Model card, Markdown; begins docs/README.md.
        name: What the bundle calls itself.
        sequences: Channels of the input, in order.
        image_size_px: Side of the slices.
        architecture: Architecture record, plain JSON.
    """
    (folder / "models").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(program, folder / "models" / "model.pt2")
    with atomic_path(folder / "models" / "model.pt") as temporary:
        torch.save({key: tensor.detach().cpu() for key, tensor in weights.items()}, temporary)
    write_json(folder / "configs" / "metadata.json", metadata(name, sequences, image_size_px, architecture))
    write_json(folder / "configs" / "inference.json", _inference(sequences, image_size_px))
    schema = resources.files("glioma_nas").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    write_text(folder / "configs" / "schema.json", schema)
    files = " and ".join(f"`{sequence}.nii.gz`" for sequence in sequences)
    write_text(folder / "docs" / "README.md", card + _README.format(files=files, side=image_size_px))
    write_text(folder / "docs" / "license.txt", _LICENCE)


def metadata(
    name: str, sequences: Sequence[str], image_size_px: int, architecture: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metadata of a bundle as plain JSON; arguments as for `write_bundle`."""
    common = {
        "type": "image",
        "spatial_shape": [image_size_px, image_size_px],
        "dtype": "float32",
        "is_patch_data": False,
    }
    image = {
        **common,
        "format": "magnitude",
        "modality": "MR",
        "num_channels": len(sequences),
        # Each sequence has mean 0 and variance 1 inside the brain; there is no bound.
        "value_range": [],
        "channel_def": {str(index): sequence for index, sequence in enumerate(sequences)},
    }
    logits = {
        **common,
        "format": "logits",
        "num_channels": len(CLASS_NAMES),
        "value_range": [],
        "channel_def": {str(index): label for index, label in enumerate(CLASS_NAMES)},
    }
    return {
        "schema": _SCHEMA_URL,
        "version": __version__,
        "changelog": {__version__: "exported by glioma_nas"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        # The name of this field has changed between versions of the schema; a bundle of either is checked.
        "required_packages_version": {"nibabel": version("nibabel")},
        "optional_packages_version": {"nibabel": version("nibabel")},
        "name": name,
        "task": "Segmentation of glioma on axial MRI slices",
        "description": "A network found by latency-aware architecture search. Research use only; not a medical device.",
        "authors": "glioma_nas",
        "copyright": "Apache-2.0 for the code; the weights belong to whoever trained them",
        "data_type": "axial slices, each sequence normalised to mean 0 and variance 1 inside the brain",
        "image_classes": "0 in the input outside the brain",
        "label_classes": ", ".join(f"{index}: {label}" for index, label in enumerate(CLASS_NAMES)),
        "pred_classes": ", ".join(f"{index}: {label}" for index, label in enumerate(CLASS_NAMES)),
        "intended_use": "research; not a medical device",
        "data_source": "the cohort of whoever trained it; see docs/README.md",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
        "glioma_nas_architecture": dict(architecture),
    }


def _inference(sequences: Sequence[str], image_size_px: int) -> dict[str, Any]:
    # Axes as the network's slices: rows from anterior to posterior, columns from the right to the left, slices upwards.
    files = ", ".join(f"str(case / '{sequence}.nii.gz')" for sequence in sequences)
    return {
        "imports": ["$import pathlib", "$import monai", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/cases'",
        "output_dir": "$@bundle_root + '/masks'",
        "device": "$torch.device('cpu')",
        "program": {"_target_": "torch.export.load", "f": "$@bundle_root + '/models/model.pt2'"},
        "network_def": "$@program.module()",
        "weights": "$torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True)",
        "cases": "$sorted(case for case in pathlib.Path(@dataset_dir).iterdir() if case.is_dir())",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "reader": "NibabelReader"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "PLS", "labels": None},
                {"_target_": "ResizeWithPadOrCropd", "keys": "image", "spatial_size": [image_size_px] * 2 + [-1]},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": f"$[{{'image': [{files}], 'case': case.name}} for case in @cases]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SliceInferer",
            "spatial_dim": 2,
            "roi_size": [image_size_px] * 2,
            "sw_batch_size": 4,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": True,
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "mask",
                    "output_dtype": "$torch.uint8",
                    "data_root_dir": "@dataset_dir",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "mask_of": (
            "$torch.no_grad()(lambda image: monai.data.MetaTensor("
            "@inferer(image.as_tensor()[None], @network_def)[0].argmax(0, keepdim=True)))"
        ),
        "initialize": ["$@network_def.load_state_dict(@weights)"],
        "run": ["$[@postprocessing({**item, 'pred': @mask_of(item['image'])}) for item in @dataset]"],
    }
