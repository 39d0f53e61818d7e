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
from glioma_nas.fold_files import read_foreign_plan, write_nnunet_splits
from glioma_nas.folds import FoldPlan, Folds, check_folds, load_fold_plan, load_folds, make_fold_plan, make_folds


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
    assert (data["n_folds"], data["seed"], data["hash"]) == (3, 0, FoldPlan(0, (folds,)).hash)
    assert set(data["repeats"][0][0]) == {"train", "test"}


def test_load_folds_refuses_a_changed_file(tmp_path: Path) -> None:
    make_folds(cases(9), n_folds=3, seed=0).write(tmp_path / "folds.json")
    data = json.loads((tmp_path / "folds.json").read_text())
    data["repeats"][0][0]["train"].append(data["repeats"][0][0]["test"][0])
    (tmp_path / "folds.json").write_text(json.dumps(data))
    with pytest.raises(StorageError, match=r"folds\.json: was changed after the folds were drawn"):
        load_folds(tmp_path / "folds.json")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"repeats": [[{}]], "used_repeat": 0, "seed": 0, "hash": ""}',
        '{"repeats": [], "used_repeat": 0, "seed": 0, "hash": ""}',
    ],
)
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


def test_repeats_are_drawn_anew_and_the_first_is_that_of_a_single_one() -> None:
    members = cases(30, idh=["a", "b", "c"] * 10)
    plan = make_fold_plan(members, n_folds=5, seed=2, repeats=3, used=1, stratify_by=("idh",))
    assert plan.repeats[0] == make_folds(members, n_folds=5, seed=2, stratify_by=("idh",))
    assert len({repeat.pairs for repeat in plan.repeats}) == 3
    assert plan.folds == plan.repeats[1]
    for repeat in plan.repeats:
        assert sorted(name for fold in range(5) for name in repeat.test(fold)) == sorted(c.case_id for c in members)


def test_inner_folds_split_the_training_patients_only() -> None:
    members = [Case(f"c{i}", f"p{i // 2}", {}, labels={"idh": "ab"[i // 2 % 2]}) for i in range(60)]
    plan = make_fold_plan(members, n_folds=3, seed=0, inner_folds=4, stratify_by=("idh",))
    patient = {case.case_id: case.patient_id for case in members}
    for fold in range(3):
        inner = plan.folds.inner_folds(fold)
        assert len(inner) == 4
        assert sorted(name for _, held in inner for name in held) == sorted(plan.folds.train(fold))
        for train, held in inner:
            assert {*train, *held} == set(plan.folds.train(fold))
            assert not {patient[name] for name in train} & {patient[name] for name in held}
            assert 4 <= sum(name for name in (int(n[1:]) // 2 % 2 for n in held)) <= 6


def test_inner_folds_that_were_not_drawn_say_so() -> None:
    with pytest.raises(CohortError, match=r"no inner folds were drawn; set folds\.inner_folds"):
        make_folds(cases(9), n_folds=3, seed=0).inner_folds(0)


def test_plan_survives_writing_and_reading(tmp_path: Path) -> None:
    plan = make_fold_plan(cases(20), n_folds=2, seed=5, repeats=2, inner_folds=3, used=1)
    plan.write(tmp_path / "folds.json")
    assert load_fold_plan(tmp_path / "folds.json") == plan
    assert load_folds(tmp_path / "folds.json") == plan.repeats[1]


def test_plan_refuses_a_repeat_that_is_not_there() -> None:
    with pytest.raises(CohortError, match=r"folds\.use_repeat is 2, but repeats are counted from 0 to 1"):
        make_fold_plan(cases(9), n_folds=3, seed=0, repeats=2, used=2)


def test_labels_are_balanced_at_every_site() -> None:
    sites = ["A"] * 40 + ["B"] * 20
    idh = (["m"] * 30 + ["w"] * 10) + (["m"] * 5 + ["w"] * 15)
    members = cases(60, site=sites, idh=idh)
    plan = make_fold_plan(members, n_folds=5, seed=0, stratify_by=("idh", "site"), site_column="site")
    label = {case.case_id: (case.labels["site"], case.labels["idh"]) for case in members}
    for fold in range(5):
        tally = Counter(label[name] for name in plan.folds.test(fold))
        assert tally == {("A", "m"): 6, ("A", "w"): 2, ("B", "m"): 1, ("B", "w"): 3}


def test_check_folds_finds_leakage_in_inner_folds() -> None:
    cohort = hashed(*(Hashed(name, name.upper(), {"t1": name}) for name in "abc"), Hashed("d", "A", {"t1": "d"}))
    pairs = ((("a", "d"), ("b", "c")), (("b", "c"), ("a", "d")))
    sound = ((("b",), ("c",)),)
    with pytest.raises(LeakageError, match=r"fold 0, inner fold 0: cases a \(train\) and d \(validation\)"):
        check_folds(Folds(0, pairs, (((("a",), ("d",)),), sound)), cohort)
    with pytest.raises(LeakageError, match=r"fold 0, inner fold 0: case b is not trained on in the outer fold"):
        check_folds(Folds(0, pairs, (((("a",), ("b",)),), sound)), cohort)


def test_nnunet_splits_go_out_and_come_back(tmp_path: Path) -> None:
    members = cases(12)
    plan = make_fold_plan(members, n_folds=3, seed=4, repeats=2, used=1)
    write_nnunet_splits(plan, tmp_path / "splits_final.json")
    splits = json.loads((tmp_path / "splits_final.json").read_text())
    assert [set(fold) for fold in splits] == [{"train", "val"}] * 6
    assert [set(fold["val"]) for fold in splits[:3]] == [set(plan.repeats[1].test(fold)) for fold in range(3)]
    back = read_foreign_plan(tmp_path / "splits_final.json", members, seed=4)
    assert (back.used, back.repeats) == (0, (plan.repeats[1], plan.repeats[0]))
    (tmp_path / "splits_final.json").write_text(json.dumps(splits[:3]))
    assert read_foreign_plan(tmp_path / "splits_final.json", members, seed=4).folds == plan.repeats[1]


@pytest.mark.parametrize(
    ("splits", "error", "message"),
    [
        ([{"train": ["c0", "c2"], "val": ["c1", "c3"]}, {"train": ["c1", "c3"], "val": ["c0", "c2"]}], LeakageError,
         r"fold 0: cases c0 \(train\) and c1 \(held out\) are of the same patient"),
        ([{"train": ["c0", "c1"], "val": ["c2"]}, {"train": ["c2", "c3"], "val": ["c0", "c1"]}], CohortError,
         "case c3 is held out by 0 folds"),
        ([{"train": ["c0", "x"], "val": ["c2"]}, {"train": [], "val": []}], CohortError,
         "names 1 cases that the cohort does not have, such as 'x'"),
        ([{"train": ["c0", "c1"], "val": ["c2", "c3"]}, {"train": ["c2", "c3"], "val": ["c0", "c1"]},
          {"train": ["c0", "c1", "c2", "c3"], "val": []}], CohortError, "fold 2 trains on 4 cases and holds out 0"),
        ([{"train": ["c0"]}], CohortError, "neither folds.json nor splits_final.json"),
        ([{"train": [], "val": ["c0", "c1", "c2", "c3"]}], CohortError, "holds 1 folds; at least 2"),
        ("text", CohortError, "neither folds.json nor splits_final.json"),
    ],
)  # fmt: skip
def test_foreign_folds_that_leak_or_do_not_fit_are_refused(
    tmp_path: Path, splits: object, error: type[Exception], message: str
) -> None:
    members = [Case(f"c{i}", f"p{i // 2}", {}) for i in range(4)]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(error, match=message):
        read_foreign_plan(tmp_path / "splits.json", members, seed=0)


def test_names_in_foreign_folds_are_not_repeated_when_ids_are_hidden(tmp_path: Path) -> None:
    splits = [{"train": ["c1"], "val": ["c0", "MILLER"]}, {"train": ["c0"], "val": ["c1"]}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(CohortError, match=r"names 1 cases that the cohort does not have; draw the folds") as raised:
        read_foreign_plan(
            tmp_path / "splits.json", [Case(f"c{i}", f"p{i}", {}) for i in (0, 1)], seed=0, hide_names=True
        )
    assert "MILLER" not in str(raised.value)
