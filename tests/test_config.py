"""Configuration files: what is refused, and that the message tells how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from glioma_nas.config import RunConfig, load_config
from glioma_nas.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "cohort: {sheet: data/cohort.csv}\nplugins: [./sharp.py]\n")
    config = load_config(path)
    assert config.cohort.sheet == tmp_path / "data" / "cohort.csv"
    assert config.plugins == (tmp_path / "sharp.py",)


def test_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "cohort: {sheet: c.csv}\ntrain: {epochs: 7}\n"))
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert again.train.epochs == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cohort: {sheet: c.csv}\ntrian: {epochs: 3}\n", r"unknown key 'trian': did you mean 'train'\?"),
        ("cohort: {sheet: c.csv}\ntrain: {epoch: 3}\n", r"unknown key 'train.epoch': did you mean 'epochs'\?"),
        (
            "cohort: {sheet: c.csv}\nclassify: {markers: {idh: {colum: idh, positive: mutant}}}\n",
            r"unknown key 'classify.markers.idh.colum': did you mean 'column'\?",
        ),
        ("seed: 1\n", "missing key 'cohort'"),
        (
            "cohort: {sheet: c.csv}\ntrain: {epochs: 0}\n",
            "'train.epochs' is 0: Input should be greater than or equal to 1",
        ),
        ("cohort: {sheet: c.csv, sequences: [flair, flair]}\n", "sequences repeat: flair, flair"),
        ("classify: {markers: {idh: {column: idh}}}\ncohort: {sheet: c.csv}\n", "give either 'positive'"),
        ("- a\n- b\n", "expected a mapping of keys at the top, got list"),
        ("cohort: {sheet: [}\n", "not valid YAML"),
    ],
)
def test_mistake_is_named_with_its_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".hidden", ""])
def test_marker_name_cannot_leave_the_run_folder(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path, f"cohort: {{sheet: c.csv}}\nclassify: {{markers: {{'{name}': {{column: idh, positive: m}}}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"classify\.markers"):
        load_config(path)


@pytest.mark.parametrize("name", ["../flair", "/flair", ".flair", "a b", ""])
@pytest.mark.parametrize("of_marker", [False, True])
def test_sequence_name_cannot_leave_its_folder(tmp_path: Path, name: str, of_marker: bool) -> None:
    text = f"cohort: {{sheet: c.csv, sequences: ['{name}']}}\n"
    if of_marker:
        marker = f"{{column: idh, positive: m, sequences: ['{name}']}}"
        text = f"cohort: {{sheet: c.csv}}\nclassify: {{markers: {{idh: {marker}}}}}\n"
    with pytest.raises(ConfigError, match=r"sequences"):
        load_config(write(tmp_path, text))


def test_yaml_cannot_construct_objects(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    path = write(tmp_path, f"cohort: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    assert not marker.exists()


def test_overrides_replace_and_add_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "cohort: {sheet: c.csv}\ntrain: {epochs: 7}\n")
    config = load_config(path, ["train.epochs=9", "search.space_options.preset=tiny", "cohort.sequences=[flair]"])
    assert config.train.epochs == 9
    assert config.search.space_options["preset"] == "tiny"
    assert config.cohort.sequences == ("flair",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "expected key=value"),
        ("seed.deep=1", "'seed' is a value"),
        ("train.epochs=[", "not valid YAML"),
    ],
)
def test_malformed_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "seed: 1\ncohort: {sheet: c.csv}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_shipped_configurations_are_valid() -> None:
    shipped = [*ROOT.glob("examples/*.yaml"), ROOT / "glioma_nas" / "demo.yaml"]
    assert shipped
    for path in shipped:
        assert isinstance(load_config(path), RunConfig), path
        assert yaml.safe_load(path.read_text())["seed"] == 0
