"""Read one NIfTI file to its last byte and check everything that can be told from it alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.errors import ImageError
from glioma_nas.images import HEADER_TEXTS, open_nifti, voxel_hash
from glioma_nas.validation.findings import FileFacts, Finding, Severity

Voxels = npt.NDArray[Any]

_COPY_AGAIN = "copy or export the file again"
_MIN_SLICES = 5
_SPACING_MM = (0.2, 12.0)
_EXTENT_MM = (80.0, 400.0)
_FORMS_APART_MM = 1.0
_SHEAR = 1e-2
_TILT_DEG = 20.0
_MAX_LABELS = 20
_MILLIMETRES = 2


class FileCheck:
    """The checks of one file; `facts` and `findings` fill up as they run.

    Args:
        path: A NIfTI file.
        case_id: For the findings.
        column: Sequence or ``mask``.
        mask_labels: Values a mask may hold besides 0.
    """

    def __init__(self, path: Path, case_id: str, column: str, mask_labels: Collection[int]) -> None:
        self.facts = FileFacts(column)
        self.findings: list[Finding] = []
        self.data: Voxels | None = None
        self._case_id = case_id
        self._column = column
        self._labels = frozenset(mask_labels)
        self._run(path)

    def _run(self, path: Path) -> None:
        try:
            image, n_bytes = open_nifti(path)
        except ImageError as err:
            # The case and the column say which file; its path may hold a name.
            what, _, remedy = str(err).replace(f"{path}: ", "").rpartition("; ")
            self._add("error", "unreadable", what, remedy or _COPY_AGAIN)
            return
        shape = tuple(int(side) for side in image.shape)
        dtype = image.get_data_dtype()
        self.facts = FileFacts(self._column, shape=shape, dtype=str(dtype))
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3 or min(shape) < 1:
            dims = "×".join(map(str, shape))
            self._add("error", "not-3d", f"shape {dims} is not one volume", "extract the volume meant, or export again")
            return
        if dtype.kind not in "iuf":
            self._add("error", "not-scalar", f"voxels are of type {dtype}", "convert to one number for each voxel")
            return
        needed = int(image.dataobj.offset) + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if n_bytes < needed:
            self._add("error", "unreadable", f"truncated, {n_bytes} of {needed} bytes are there", _COPY_AGAIN)
            return
        data = np.asarray(image.dataobj).reshape(shape)
        affine = np.asarray(image.affine, dtype=np.float64)
        has_place = bool(np.isfinite(affine).all()) and abs(float(np.linalg.det(affine[:3, :3]))) > 1e-9
        self.facts = FileFacts(self._column, shape, dtype=str(dtype), voxel_hash=voxel_hash(data))
        if not has_place:
            self._add("error", "affine", "the affine is singular or not finite: voxels have no place", _COPY_AGAIN)
        else:
            self._check_geometry(image, affine, shape)
        self._check_header_text(image.header)
        if self._check_values(data):
            self.data = data

    def _check_geometry(self, image: Any, affine: npt.NDArray[np.float64], shape: tuple[int, ...]) -> None:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        directions = affine[:3, :3] / spacing
        tilt = float(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0), 0, 1)).max()))
        self.facts = replace(
            self.facts,
            spacing_mm=tuple(round(float(side), 4) for side in spacing),
            orientation="".join(str(letter) for letter in nib.aff2axcodes(affine)),
            tilt_deg=round(tilt, 1),
            affine=tuple(tuple(float(cell) for cell in row) for row in affine),
        )
        header = image.header
        if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
            self._add(
                "warning",
                "no-orientation",
                "neither qform nor sform is set, so left and right are a guess",
                "convert again from DICOM, or set the affine after looking at the scan",
            )
        elif int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0:
            apart = _forms_apart_mm(header, shape)
            if apart is None or not apart <= _FORMS_APART_MM:
                how = "qform holds no rotation" if apart is None else f"qform and sform are {apart:.1f} mm apart"
                self._add(
                    "warning",
                    "forms-differ",
                    f"{how}; programs disagree on which counts (here: sform)",
                    "write one affine into both",
                )
        gram = directions.T @ directions
        if float(np.abs(gram - np.eye(3)).max()) > _SHEAR:
            self._add("warning", "sheared", "the axes are not at right angles", "resample to an orthogonal grid")
        if tilt > _TILT_DEG:
            self._add("note", "oblique", f"slices are tilted by {tilt:.0f}°", "nothing: slices are cut as they are")
        units = int(header["xyzt_units"]) % 8
        if units not in (0, _MILLIMETRES):
            name = {1: "metres", 3: "micrometres"}.get(units, f"a unit of code {units}")
            self._add("warning", "units", f"the header gives lengths in {name}, read as millimetres", "convert again")
        low, high = float(spacing.min()), float(spacing.max())
        if low < _SPACING_MM[0] or high > _SPACING_MM[1]:
            self._add(
                "warning",
                "spacing",
                f"voxel sides of {low:.3g} to {high:.3g} mm are unusual for brain MRI",
                "look whether the header's spacing is true",
            )
        extent = spacing * np.array(shape)
        if float(extent.max()) > _EXTENT_MM[1] or float(np.sort(extent)[1]) < _EXTENT_MM[0]:
            size = " × ".join(f"{side:.0f}" for side in extent)
            self._add(
                "warning",
                "extent",
                f"the volume measures {size} mm, which no head does",
                "look whether spacing is true",
            )
        if min(shape) < _MIN_SLICES:
            self._add("warning", "few-slices", f"only {min(shape)} slices", "check that the series is complete")

    def _check_header_text(self, header: Any) -> None:
        texts = [bytes(header[name].tobytes()).strip(b"\0 ") for name in HEADER_TEXTS if name in header]
        if any(texts) or len(header.extensions):
            self._add(
                "note",
                "header-text",
                "the header holds free text or extensions, where converters leave dates and names",
                "look with `glioma-nas phi-scan`, remove with `glioma-nas cohort scrub`",
            )

    def _check_values(self, data: Voxels) -> bool:
        is_mask = self._column == "mask"
        bad = int(np.count_nonzero(~np.isfinite(data))) if data.dtype.kind == "f" else 0
        if bad:
            share = 100 * bad / data.size
            self._add(
                "error",
                "not-finite",
                f"{bad} voxels ({share:.2g} %) are NaN or infinite",
                "replace them, or convert again",
            )
            return False
        low, high = float(data.min()), float(data.max())
        zero_share = float(np.count_nonzero(data == 0)) / data.size
        self.facts = replace(self.facts, low=low, high=high, zero_share=round(zero_share, 4))
        if is_mask:
            return self._check_labels(data)
        if low == high:
            self._add("error", "constant", f"every voxel is {low:g}", "export again, or empty the cell")
            return False
        border = np.concatenate([data[[0, -1]].ravel(), data[:, [0, -1]].ravel()])
        if float(np.count_nonzero(border)) > 0.2 * border.size and zero_share < 0.3:
            self._add(
                "warning",
                "background",
                f"only {100 * zero_share:.0f} % of the voxels are 0, so the background was not removed",
                "add a skull-stripping step to preprocess.steps, or strip the skull beforehand",
            )
        return True

    def _check_labels(self, data: Voxels) -> bool:
        values, counts = np.unique(data, return_counts=True)
        shown = zip(values[:_MAX_LABELS], counts[:_MAX_LABELS], strict=True)
        self.facts = replace(self.facts, labels={f"{value:g}": int(count) for value, count in shown})
        fractional = [float(value) for value in values if value != round(float(value))]
        unknown = [float(value) for value in values if value != 0 and value not in self._labels]
        allowed = ", ".join(map(str, sorted(self._labels)))
        if fractional:
            text = f"{len(values)} values, some between whole numbers (such as {fractional[0]:.3g})"
            self._add("error", "mask-labels", text, "a mask was resampled with interpolation: use nearest neighbour")
            return False
        if unknown:
            listed = ", ".join(f"{value:g}" for value in unknown[:5]) + (", …" if len(unknown) > 5 else "")
            self._add(
                "error",
                "mask-labels",
                f"labels {listed} are not among 0, {allowed}",
                "correct the mask, or extend cohort.mask_labels",
            )
            return False
        if not np.any(data):
            self._add("warning", "empty-mask", "the mask is empty", "right only for a patient without visible tumour")
        return True

    def _add(self, severity: Severity, code: str, message: str, remedy: str) -> None:
        self.findings.append(Finding(severity, code, message, remedy, self._case_id, self._column))


def _forms_apart_mm(header: Any, shape: tuple[int, ...]) -> float | None:
    """Return how far the corners lie apart under qform and sform; None when the qform's quaternion is none."""
    try:
        difference = header.get_sform() - header.get_qform()
    except ValueError:
        return None
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    return float(np.abs(corners @ difference.T).max())
