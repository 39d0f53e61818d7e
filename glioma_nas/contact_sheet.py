"""Draw what preprocessing did to one case: each sequence as it was read and as networks see it, in one PNG.

Drawn with Pillow: a plotting library would take longer than the rest of a case.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.files import write_bytes
from glioma_nas.grids import spacing_mm
from glioma_nas.images import Affine

_SIDE_PX = 168
_GAP_PX = 4
_TITLE_PX = 34
_MARGIN_VOXELS = 4
_BRAIN_COLOUR = (0, 190, 230)
_TUMOUR_COLOUR = (255, 60, 60)
_LEVELS = (0.35, 0.5, 0.65)

Plane = npt.NDArray[Any]


def write_contact_sheet(path: Path, title: str, read: CaseVolumes, prepared: CaseVolumes) -> None:
    """Write the sheet of one case.

    One row for each sequence. Left of the gap as read: an axial and a coronal plane. Right of it as prepared: three
    axial planes, the middle one through the largest area of the mask, and a coronal one. The brain of the reference is
    outlined in blue on every sequence, so that a shifted one shows; the mask in red.

    Args:
        path: The PNG; replaced atomically.
        title: Case id.
        read: As read from the files.
        prepared: After the last step, on one grid.
    """
    names = list(prepared.images)
    width = 6 * (_SIDE_PX + _GAP_PX) + 5 * _GAP_PX
    sheet = Image.new("RGB", (width, _TITLE_PX + len(names) * (_SIDE_PX + _GAP_PX)), (0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 3), f"{title}    reference: {read.reference}    blue: its brain, red: mask", fill=(255, 255, 255))
    draw.text((6, 18), "as read: axial, coronal", fill=(170, 170, 170))
    draw.text((2 * (_SIDE_PX + _GAP_PX) + 5 * _GAP_PX + 6, 18), "prepared: axial x 3, coronal", fill=(170, 170, 170))
    brain = prepared.images[prepared.reference] != 0
    for line, name in enumerate(names):
        top = _TITLE_PX + line * (_SIDE_PX + _GAP_PX)
        for column, panel in enumerate([*_as_read(read, name), *_as_prepared(prepared, name, brain)]):
            left = column * (_SIDE_PX + _GAP_PX) + (5 * _GAP_PX if column >= 2 else 0)
            sheet.paste(panel, (left, top))
        draw.text((6, top + 4), name, fill=(255, 255, 120))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _as_read(read: CaseVolumes, name: str) -> list[Image.Image]:
    data, affine = _canonical(read.images[name], read.affine_of(name))
    mask = None
    if read.mask is not None and (read.mask_on or read.reference) in (name, *_on_grid_of(read, name)):
        mask = _canonical(read.mask, read.affine_of(name))[0] > 0
    return _planes(data, affine, mask, None, (0.5,))


def _on_grid_of(read: CaseVolumes, name: str) -> list[str]:
    return [] if name in read.other_affines else [other for other in read.images if other not in read.other_affines]


def _as_prepared(prepared: CaseVolumes, name: str, brain: npt.NDArray[np.bool_]) -> list[Image.Image]:
    mask = None if prepared.mask is None else prepared.mask > 0
    return _planes(prepared.images[name], prepared.affine, mask, brain, _LEVELS)


def _planes(
    data: Plane, affine: Affine, mask: Plane | None, brain: Plane | None, levels: tuple[float, ...]
) -> list[Image.Image]:
    """Return axial panels at ``levels`` of the volume's content, and one coronal panel, without empty margins."""
    data, mask, brain = _trimmed(data, mask, brain)
    content = np.flatnonzero((data != data.flat[0]).any(axis=(0, 1)))
    low, high = (int(content[0]), int(content[-1])) if content.size else (0, data.shape[2] - 1)
    places = [round(low + level * (high - low)) for level in levels]
    row = data.shape[1] // 2
    if mask is not None and mask.any():
        places[len(places) // 2] = int(mask.sum(axis=(0, 1)).argmax())
        row = int(mask.sum(axis=(0, 2)).argmax())
    window = _window(data)
    side = spacing_mm(affine)
    panels = [_panel(data[:, :, z], side[0], side[1], window, _cut(mask, z), _cut(brain, z)) for z in places]
    coronal = (None if volume is None else volume[:, row, :] for volume in (mask, brain))
    panels.append(_panel(data[:, row, :], side[0], side[2], window, *coronal))
    return panels


def _trimmed(data: Plane, *others: Plane | None) -> list[Any]:
    box = []
    for axis in (0, 1):
        seen = np.flatnonzero((data != data.flat[0]).any(axis=(1 - axis, 2)))
        first, last = (int(seen[0]), int(seen[-1])) if seen.size else (0, data.shape[axis] - 1)
        box.append(slice(max(0, first - _MARGIN_VOXELS), last + _MARGIN_VOXELS + 1))
    return [None if volume is None else volume[box[0], box[1]] for volume in (data, *others)]


def _cut(volume: Plane | None, z: int) -> Plane | None:
    return None if volume is None else volume[:, :, z]


def _window(data: Plane) -> tuple[float, float]:
    values = data[data != 0]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values[:: max(1, values.size // 100_000)], [1, 99.5])
    return float(low), float(max(high, low + 1e-6))


def _panel(
    plane: Plane,
    width_mm: float,
    height_mm: float,
    window: tuple[float, float],
    mask: Plane | None,
    brain: Plane | None,
) -> Image.Image:
    """Draw one plane (first axis to the right of the patient, second up) with its outlines, in its true proportions."""
    low, high = window
    grey = np.where(plane == 0, 0, np.clip((plane - low) / (high - low), 0, 1) * 235 + 20).astype(np.uint8)
    extent = np.array([plane.shape[0] * width_mm, plane.shape[1] * height_mm])
    size = np.maximum(1, np.rint(extent / extent.max() * _SIDE_PX)).astype(int)
    shown = np.stack([np.asarray(_turned(grey).resize(tuple(size.tolist()), Image.Resampling.BILINEAR))] * 3, axis=-1)
    for outline, colour in ((brain, _BRAIN_COLOUR), (mask, _TUMOUR_COLOUR)):
        if outline is not None and outline.any():
            large = np.asarray(_turned(outline.astype(np.uint8) * 255).resize(tuple(size.tolist()))) > 127
            shown[_edge(large)] = colour
    panel = Image.new("RGB", (_SIDE_PX, _SIDE_PX), (0, 0, 0))
    panel.paste(Image.fromarray(shown), tuple(((_SIDE_PX - size) // 2).tolist()))
    return panel


def _turned(plane: Plane) -> Image.Image:
    # As radiologists look: the patient's right at the left, anterior or superior on top.
    return Image.fromarray(np.ascontiguousarray(plane[::-1, ::-1].T))


def _edge(mask: Plane) -> Plane:
    inner = mask.copy()
    inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    inner[[0, -1]] = False
    inner[:, [0, -1]] = False
    edge: Plane = mask & ~inner
    return edge


def _canonical(data: Plane, affine: Affine) -> tuple[Plane, Affine]:
    orientation = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(data, orientation)
    return turned, affine @ nib.orientations.inv_ornt_aff(orientation, data.shape)
