"""Deliver a network as a MONAI bundle: metadata, an inference configuration and the network as a torch.export program.

MONAI's ``verify_metadata`` checks ``configs/metadata.json`` without a network connection when it is given the schema
beside it as ``--filepath``. That schema is ours, written from MONAI's description of the fields; MONAI's own lies on
its server, at the address in the metadata's ``schema``.

Reference: MONAI bundle specification, https://docs.monai.io/en/stable/mb_specification.html.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glioma_nas import __version__
from glioma_nas.files import write_json, write_text

_SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
SCHEMA_FILE = "bundle_schema.json"
CLASS_NAMES = ("background", "tumour")


def write_bundle(
    folder: Path, *, program: Path, card: str, name: str, sequences: Sequence[str], image_size_px: int
) -> None:
    """Write a bundle.

    Args:
        folder: The bundle's folder; made if need be.
        program: The network as ``torch.export`` saved it.
        card: Model card, Markdown; becomes docs/README.md.
        name: What the bundle calls itself.
        sequences: Channels of the input, in order.
        image_size_px: Side of the slices.
    """
    (folder / "models").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(program, folder / "models" / "model.pt2")
    write_json(folder / "configs" / "metadata.json", metadata(name, sequences, image_size_px))
    write_json(folder / "configs" / "inference.json", _inference())
    schema = resources.files("glioma_nas").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    write_text(folder / "configs" / "schema.json", schema)
    write_text(folder / "docs" / "README.md", card)


def metadata(name: str, sequences: Sequence[str], image_size_px: int) -> dict[str, Any]:
    """Return the metadata of a bundle as plain JSON."""
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
        "required_packages_version": {},
        "name": name,
        "task": "Segmentation of glioma on axial MRI slices",
        "description": "A network found by latency-aware architecture search. Research use only; not a medical device.",
        "authors": "glioma_nas",
        "copyright": "Apache-2.0 for the code; the weights belong to whoever trained them",
        "data_type": "axial slices, each sequence normalised to mean 0 and variance 1 inside the brain",
        "image_classes": "0 in the input outside the brain",
        "label_classes": ", ".join(f"{index}: {label}" for index, label in enumerate(CLASS_NAMES)),
        "pred_classes": ", ".join(f"{index}: {label}" for index, label in enumerate(CLASS_NAMES)),
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
    }


def _inference() -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "program": {"_target_": "torch.export.load", "f": "$@bundle_root + '/models/model.pt2'"},
        "network_def": "$@program.module()",
        "postprocessing": {"_target_": "monai.transforms.AsDiscrete", "argmax": True},
    }
