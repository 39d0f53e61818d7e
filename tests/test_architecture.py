"""The architecture record: its identity and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ArchitectureError


def example() -> Architecture:
    return Architecture(
        "nasbranet", {"widths": [4, 8], "preset": None}, {"op_s2_l1": "conv", "in_s4_l3": [1], "width": 8}
    )


def test_id_depends_on_content_not_on_key_order() -> None:
    first = Architecture("s", {"a": 1, "b": 2}, {"x": [1], "y": 2})
    second = Architecture("s", {"b": 2, "a": 1}, {"y": 2, "x": (1,)})
    assert first.id == second.id
    assert first == second
    assert first.id != Architecture("s", {"a": 1, "b": 2}, {"x": [0], "y": 2}).id


def test_file_round_trip_keeps_everything(tmp_path: Path) -> None:
    record = example()
    record.save(tmp_path / "a.json")
    again = Architecture.load(tmp_path / "a.json")
    assert again == record
    assert again.sample() == {"op_s2_l1": "conv", "in_s4_l3": [1], "width": 8}
    assert again.space_options() == {"widths": [4, 8], "preset": None}


def test_record_cannot_be_changed() -> None:
    record = example()
    with pytest.raises(TypeError):
        record.choices["width"] = 4  # type: ignore[index]
    record.sample()["width"] = 4
    assert record.choices["width"] == 8


def test_edited_file_is_refused(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    data["choices"]["width"] = 4
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ArchitectureError, match="does not fit its content"):
        Architecture.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 99}, "format 99"), ({"choices": 3}, "choices of an architecture must be a mapping, got int")],
)
def test_foreign_file_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        Architecture.from_json({**example().to_json(), **change})


def test_values_other_than_plain_json_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="plain JSON values only, got set"):
        Architecture("s", {"widths": {1, 2}}, {})
