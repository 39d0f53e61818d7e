"""The checklists hold every item of the guidelines once, and never claim what a run does not show."""

from __future__ import annotations

import csv
import io

import pytest

from glioma_nas.report.checklist_items import CLAIM_2024, TRIPOD_AI, Item
from glioma_nas.report.checklists import Evidence, answers, to_csv


def test_claim_has_its_44_items_in_order() -> None:
    assert [item.number for item in CLAIM_2024] == [str(number) for number in range(1, 45)]


def test_tripod_has_its_27_items_and_52_parts() -> None:
    numbers = [item.number for item in TRIPOD_AI]
    assert len(numbers) == len(set(numbers)) == 52
    assert list(dict.fromkeys(int(number.rstrip("abcdefg")) for number in numbers)) == list(range(1, 28))


@pytest.mark.parametrize("item", [*CLAIM_2024, *TRIPOD_AI], ids=lambda item: f"{item.part}-{item.number}")
def test_item_is_answered_by_the_run_or_tells_the_authors_what_to_write(item: Item) -> None:
    assert item.topic and (item.answer or item.hint)


def test_state_follows_the_evidence() -> None:
    items = (Item("1", "a", "b", "known", "add this"), Item("2", "a", "b", "lacking"), Item("3", "a", "b", hint="x, y"))
    known = {"known": Evidence("auto", "there"), "lacking": Evidence("missing", "do that")}
    rows = list(csv.DictReader(io.StringIO(to_csv(answers(items, known)))))
    assert [(row["state"], row["where"]) for row in rows] == [
        ("auto", "there; authors: add this"),
        ("missing", "do that"),
        ("manual", "x, y"),
    ]
