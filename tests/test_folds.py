"""Patient-level folds: balance, determinism, leakage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glioma_nas.cohort import Case
from glioma_nas.errors import CohortError, LabelError, LeakageError, StorageError
from glioma_nas.folds import Folds, check_folds, load_folds, make_folds


def cases(n: int, **labels: list[str]) -> list[Case]:
    return [
        Case(f"c{i}", f"p{i}", {}, labels={name: values[i] for name, values in labels.items() if values[i]})
        for i in range(n)
    ]


@dataclass(frozen=True)
class Hashed:
    case_id: str
    patient_id: str
    voxel_hashes: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HashedCohort:
    cases: dict[str, Hashed]


def hashed(*members: Hashed) -> HashedCohort:
    return HashedCohort({member.case_id: member for member in members})


def test_make_folds_holds_every_case_out_once() -> None:
    members = cases(23)
    folds = make_folds(members, n_folds=5, seed=0)
    held = [case_id for fold in range(folds.n) for case_id in folds.test(fold)]
    assert sorted(held) == sorted(case.case_id for case in members)
    for fold in range(folds.n):
        assert set(folds.train(fold)) == set(held) - set(folds.test(fold))
        assert all(folds.fold_of(case_id) == fold for case_id in folds.test(fold))
    assert sorted(len(folds.test(fold)) for fold in range(5)) == [4, 4, 5, 5, 5]


def test_make_folds_keeps_a_patient_on_one_side() -> None:
    members = [Case(f"c{i}", f"p{i // 3}", {}) for i in range(30)]
    folds = make_folds(members, n_folds=3, seed=1)
    for fold in range(3):
        sides = [{int(case_id[1:]) // 3 for case_id in side} for side in folds.pairs[fold]]
        assert not sides[0] & sides[1]


def test_make_folds_spreads_a_rare_class_evenly() -> None:
    idh = ["wildtype"] * 10 + ["mutant"] * 43 + [""] * 2
    members = cases(55, idh=idh)
    folds = make_folds(members, n_folds=5, seed=3, stratify_by=("idh",))
    known = {case.case_id: case.labels.get("idh", "unknown") for case in members}
    tallies = [Counter(known[case_id] for case_id in folds.test(fold)) for fold in range(5)]
    assert [tally["wildtype"] for tally in tallies] == [2] * 5
    assert all(8 <= tally["mutant"] <= 9 for tally in tallies)
    assert all(len(folds.test(fold)) == 11 for fold in range(5))


def test_make_folds_balances_two_columns_at_once() -> None:
    idh = ["wildtype", "mutant"] * 20
    sex_like = ["x"] * 20 + ["y"] * 20
    members = cases(40, idh=idh, other=sex_like)
    folds = make_folds(members, n_folds=4, seed=0, stratify_by=("idh", "other"))
    for column in ("idh", "other"):
        known = {case.case_id: case.labels[column] for case in members}
        for fold in range(4):
            assert all(4 <= count <= 6 for count in Counter(known[case_id] for case_id in folds.test(fold)).values())


def test_make_folds_balances_numbers_by_tertile() -> None:
    members = cases(30, ki67=[str(i) for i in range(30)])
    folds = make_folds(members, n_folds=5, seed=0, stratify_by=("ki67",))
    for fold in range(5):
        values = [int(case_id[1:]) for case_id in folds.test(fold)]
        assert [sum(low <= value < low + 10 for value in values) for low in (0, 10, 20)] == [2, 2, 2]


def test_make_folds_depends_on_the_seed_only() -> None:
    members = cases(30, idh=["a", "b", "c"] * 10)
    script = (
        "from glioma_nas.cohort import Case; from glioma_nas.folds import make_folds;"
        "members = [Case(f'c{i}', f'p{i}', {}, labels={'idh': 'abc'[i % 3]}) for i in range(30)];"
        "print(make_folds(members, n_folds=4, seed=7, stratify_by=('idh',)).hash)"
    )
    other_process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    )
    here = make_folds(members, n_folds=4, seed=7, stratify_by=("idh",))
    assert other_process.stdout.strip() == here.hash
    assert make_folds(members, n_folds=4, seed=8, stratify_by=("idh",)).hash != here.hash


def test_make_folds_refuses_more_folds_than_patients() -> None:
    members = [Case(f"c{i}", f"p{i % 3}", {}) for i in range(9)]
    with pytest.raises(CohortError, match=r"3 patients cannot be split into 4 folds; set folds\.n_folds to at most 3"):
        make_folds(members, n_folds=4, seed=0)


def test_make_folds_refuses_a_column_the_sheet_lacks() -> None:
    with pytest.raises(LabelError, match=r"stratify_by names column 'idh1'.*did you mean 'idh'"):
        make_folds(cases(9, idh=["a"] * 9), n_folds=3, seed=0, stratify_by=("idh1",))


def test_make_folds_accepts_a_column_nobody_knows() -> None:
    assert make_folds(cases(9), n_folds=3, seed=0, stratify_by=("idh",), columns=("idh",)).n == 3


def test_folds_survive_writing_and_reading(tmp_path: Path) -> None:
    folds = make_folds(cases(9), n_folds=3, seed=0)
    folds.write(tmp_path / "folds.json")
    assert load_folds(tmp_path / "folds.json") == folds
    data = json.loads((tmp_path / "folds.json").read_text())
    assert (data["n_folds"], data["seed"], data["hash"]) == (3, 0, folds.hash)
    assert set(data["folds"][0]) == {"train", "test"}


def test_load_folds_refuses_a_changed_file(tmp_path: Path) -> None:
    make_folds(cases(9), n_folds=3, seed=0).write(tmp_path / "folds.json")
    data = json.loads((tmp_path / "folds.json").read_text())
    data["folds"][0]["train"].append(data["folds"][0]["test"][0])
    (tmp_path / "folds.json").write_text(json.dumps(data))
    with pytest.raises(StorageError, match=r"folds\.json: was changed after the folds were drawn"):
        load_folds(tmp_path / "folds.json")


@pytest.mark.parametrize("content", ["{}", "[]", '{"folds": [{}], "seed": 0, "hash": ""}'])
def test_load_folds_refuses_other_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "folds.json").write_text(content)
    with pytest.raises(StorageError, match="not a folds file"):
        load_folds(tmp_path / "folds.json")


def test_fold_of_refuses_an_unknown_case() -> None:
    with pytest.raises(CohortError, match="case z is in none of the 3 folds"):
        make_folds(cases(9), n_folds=3, seed=0).fold_of("z")


def test_check_folds_accepts_clean_folds() -> None:
    cohort = hashed(Hashed("a", "p", {"t1": "1"}), Hashed("b", "p", {"t1": "2"}), Hashed("c", "q", {"t1": "3"}))
    check_folds(Folds(0, ((("a", "b"), ("c",)), (("c",), ("a", "b")))), cohort)


def test_check_folds_refuses_one_patient_on_both_sides() -> None:
    cohort = hashed(Hashed("a", "SECRET", {}), Hashed("b", "SECRET", {}))
    with pytest.raises(
        LeakageError, match=r"fold 0: cases b \(train\) and a \(test\) are of the same patient"
    ) as caught:
        check_folds(Folds(0, ((("b",), ("a",)), (("a",), ("b",)))), cohort)
    assert "SECRET" not in str(caught.value)


def test_check_folds_refuses_identical_voxels_under_two_patients() -> None:
    cohort = hashed(Hashed("a", "p", {"t1": "1", "flair": "9"}), Hashed("b", "q", {"t1": "2", "flair": "9"}))
    folds = Folds(0, ((("b",), ("a",)), (("a",), ("b",))))
    with pytest.raises(
        LeakageError, match=r"flair of case b \(train\) and flair of case a \(test\) hold identical voxels"
    ):
        check_folds(folds, cohort)


def test_check_folds_refuses_a_case_held_out_twice_or_never() -> None:
    cohort = hashed(Hashed("a", "p", {}), Hashed("b", "q", {}))
    with pytest.raises(CohortError, match="case b is held out by 0 folds instead of one"):
        check_folds(Folds(0, ((("b",), ("a",)), ((), ()))), cohort)
    with pytest.raises(CohortError, match="folds name case z, which was not prepared"):
        check_folds(Folds(0, ((("z",), ("a",)), (("a",), ("b",)))), cohort)
