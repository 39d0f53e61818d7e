"""Trials proper in real NNI experiments: a co-search seen in a browser and resumed, plugins that fail, real results."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from glioma_nas.nni_experiments.loopback import exposed_addresses, install_guard
from glioma_nas.nni_experiments.trial_metrics import FINAL_KEYS
from tests.nni_runs import Nni, nni_in, output_of, require_program, tensorboard_tags, until
from tests.tiny_run import TINY_RUN, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux"),
    pytest.mark.timeout(
        3600
    ),  # the waits within a test have limits of their own, which add up to more than the default
]

# Long enough for the network to find some tumour.
TRAINING = {"epochs": 3, "steps_per_epoch": 12, "batch_size": 4, "learning_rate": 0.05}


@pytest.fixture
def nni(tmp_path: Path) -> Iterator[Nni]:
    with nni_in(tmp_path) as found:
        yield found


def trial_after_epochs(experiment: Path, count: int, beside: Path | None = None) -> Path | None:
    """Return the epochs' file of a trial that has done so many, of another one than that in the folder ``beside``."""
    files = (path for path in experiment.glob("trials/*/epochs.json") if path.parent != beside)
    return next((path for path in files if len(json.loads(path.read_text())) >= count), None)


def test_co_search_survives_its_manager_and_shows_in_the_web_ui(nni: Nni, tmp_path: Path) -> None:
    experiment = tmp_path / "experiment"
    nni.call(
        *("nni", "config", write_run(tmp_path, train=TRAINING), "--out", experiment),
        *("--trials", 3, "--tuner", "GridSearch"),
        *("--strategy", "co_search", "--strategy", "nni.gumbel_darts", "--search", "strategy"),
    )
    code = "".join(path.read_text() for path in (experiment / "code").rglob("*") if path.is_file())
    assert "cohort.csv" not in code and "P001" not in code
    record = nni.start_plainly(experiment, guard=install_guard(tmp_path / "site").parent)
    # Two, because a trial that began anew would be taken for one that does its only epoch again.
    epochs = until(lambda: trial_after_epochs(experiment, 2), 120, "two epochs of a trial")
    sockets = psutil.Process(record["pid"]).net_connections(kind="inet")
    listening = {item.laddr.ip for item in sockets if item.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"} and not exposed_addresses(record["pid"])
    os.kill(record["pid"], signal.SIGKILL)
    assert not (epochs.parent / "result.json").exists()
    nni.call("nni", "resume", record["id"], "--detach")
    after = nni.newest()

    # The second trial is held in its search, so that the web UI is seen while the experiment runs.
    held_epochs = until(
        lambda: trial_after_epochs(experiment, 3, beside=epochs.parent), 240, "the second trial's epochs"
    )
    (held,) = [trial for trial in nni.trials(after) if trial["status"] == "RUNNING"]
    processes = trial_processes(held["trialJobId"])
    for process in processes:
        process.suspend()
    assert not (held_epochs.parent / "result.json").exists()
    reported = nni.get(after["port"], f"/metric-data/{held['trialJobId']}")
    curve = [json.loads(json.loads(item["data"]))["default"] for item in reported]
    assert len(curve) >= 2 and curve == [row["default"] for row in json.loads(held_epochs.read_text())][: len(curve)]
    state = nni.get(after["port"], "/check-status")["status"]
    assert state in ("RUNNING", "NO_MORE_TRIAL")  # the latter while the last one runs
    look_at_web_ui(after["port"], tmp_path, state, curve)
    assert nni.get(after["port"], "/check-status")["status"] == state
    for process in processes:
        process.resume()

    # NNI's grid proposes the interrupted trial's parameters again; that one finds the result and shows the whole curve.
    nni.wait(after, timeout_s=240)
    trials = nni.trials(after)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 3
    for trial in trials:
        metrics = json.loads(json.loads(trial["finalMetricData"][0]["data"]))
        assert list(metrics)[:2] == ["default", "dice"] and 0 < metrics["default"] < 2
        assert metrics["latency_p95_ms"] >= metrics["latency_ms"] > 0
        output = output_of(trial)
        assert "<svg" in (output / "report.html").read_text() and (output / "architecture.svg").is_file()
        expected = {"architecture", "search/loss_weights", "train/loss"}
        if "co_search" in trial["hyperParameters"][0]:
            expected |= {"student/alpha, operators", "student/gamma, widths", "teacher/beta, inputs"}
        assert tensorboard_tags(output / "tensorboard") >= expected
    nni.nnictl("experiment", "export", after["id"], "-t", "csv", "-i", "-f", tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == 3
    assert set(table[0]) == {"strategy", "trialJobId", "intermediate", *FINAL_KEYS}
    assert {row["strategy"] for row in table} == {"co_search", "nni.gumbel_darts"}
    assert all(row["intermediate"].count('"epoch"') == 6 for row in table)
    as_if_never_interrupted(experiment, epochs.parent, tmp_path / "reference", nni)


def as_if_never_interrupted(experiment: Path, resumed: Path, folder: Path, nni: Nni) -> None:
    """Run a trial's parameters again elsewhere, without an interruption, and compare all but what a clock measured."""
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from nni.runtime import trial_command_channel as nni_side; "
        "from tests.test_nni_trial_run import OneTrial; nni_side._channel = OneTrial({'strategy': 'co_search'}); "
        "from glioma_nas.nni_experiments.trial_process import main; sys.exit(main(Path(sys.argv[1])))"
    )
    places = {"GLIOMA_NAS_NNI_TRIALS": str(folder / "trials"), "NNI_OUTPUT_DIR": str(folder)}
    command = [sys.executable, "-c", code, str(experiment / "code" / "trial.yaml")]
    subprocess.run(command, env={**nni.environment, **places}, check=True, timeout=600)
    straight = folder / "trials" / resumed.name  # found by the hash of its parameters
    kinds = [(row["stage"], row["epoch"]) for row in json.loads((resumed / "epochs.json").read_text())]
    assert kinds == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # none done twice
    for name in ("search/student.json", "search/teacher.json", "search/probabilities.json", "epochs.json"):
        assert json.loads((resumed / name).read_text()) == json.loads((straight / name).read_text()), name
    results = [json.loads((found / "result.json").read_text()) for found in (resumed, straight)]
    first, second = ({k: v for k, v in result.items() if not k.startswith("latency")} for result in results)
    assert first == second


def trial_processes(trial_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NNI_TRIAL_JOB_ID") == trial_id:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@contextmanager
def browser(size: tuple[int, int] = (1500, 1200)) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = require_program("chromium", "chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(require_program("chromedriver", "chromium-driver")))
    try:
        yield driver
    finally:
        driver.quit()


# What is read and what is pressed in one go: the page draws itself anew every few seconds.
_TEXTS = "return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)"
_PRESS = """
const named = item => [item.textContent.trim(), item.name, item.title].includes(arguments[0]);
const places = [...document.querySelectorAll(arguments[1])].filter(item => item.textContent.includes(arguments[2]));
const found = places.flatMap(item => [...item.querySelectorAll('button')]).find(named);
if (found) found.click();
return Boolean(found);
"""
_TICK = """
const boxes = [...document.querySelectorAll('.ms-Dialog-main .ms-Checkbox')];
const wanted = boxes.filter(box => /dice|latency|hd95|seed/.test(box.textContent));
wanted.map(box => box.querySelector('input')).filter(input => !input.checked).forEach(input => input.click());
return wanted.length;
"""
# The curves that a chart (React's component above its canvas) was given, and how wide what it has drawn in colour is:
# axes and their numbers are grey, and the legend stands above the first 40 pixels.
_CURVES = """
const canvas = document.querySelector(arguments[0] + ' canvas');
if (!canvas) return null;
let given = null;
for (let box = canvas; box && !given; box = box.parentElement) {
    const key = Object.keys(box).find(name => /^__react(Fiber|InternalInstance)/.test(name));
    for (let node = key && box[key]; node && !given; node = node.return) {
        given = node.memoizedProps && node.memoizedProps.option;
        given = given && Array.isArray(given.series) ? given : undefined;
    }
}
const scale = canvas.width / canvas.clientWidth, top = Math.ceil(45 * scale);
const pixels = canvas.getContext('2d').getImageData(0, top, canvas.width, canvas.height - top).data;
let first = canvas.width, last = -1;
for (let at = 0; at < pixels.length; at += 4) {
    const colours = [pixels[at], pixels[at + 1], pixels[at + 2]];
    if (pixels[at + 3] > 128 && Math.max(...colours) - Math.min(...colours) > 60) {
        const column = (at / 4) % canvas.width;
        first = Math.min(first, column);
        last = Math.max(last, column);
    }
}
return {curves: given ? given.series.map(item => item.data) : [], width: (last - first) / canvas.width};
"""


def look_at_web_ui(port: int, shots: Path, state: str, running: list[float]) -> None:
    """Open every page a user looks at and read what stands there; screenshots go to ``shots``.

    Args:
        port: Of an experiment that runs, with a finished trial and one that has reported epochs.
        shots: Folder.
        state: The experiment's.
        running: The default figure of the running trial's epochs.
    """
    with browser() as driver:

        def shows(selector: str, *words: str) -> Any:
            found = driver.execute_script(_TEXTS, selector)
            return found and all(any(word in text for text in found) for word in words)

        def press(name: str, place: str = "body", word: str = "") -> None:
            until(lambda: driver.execute_script(_PRESS, name, place, word), 30, f"a button '{name}'")

        def curves(chart: str) -> Any:
            found = driver.execute_script(_CURVES, chart)
            return found and found["width"] > 0.3 and [curve for curve in found["curves"] if curve]

        def shoot(name: str) -> None:
            driver.save_screenshot(str(shots / f"{name}.png"))
            assert (shots / f"{name}.png").stat().st_size > 10_000  # not a blank page

        driver.get(f"http://127.0.0.1:{port}/oview")
        until(lambda: shows("body", state, "SUCCEEDED"), 30, "the overview of a running experiment")
        shoot("overview")

        driver.get(f"http://127.0.0.1:{port}/detail")
        press("Add/Remove columns")
        until(lambda: driver.execute_script(_TICK) >= 4, 30, "the columns dialog with our figures")
        press("Save")
        until(lambda: shows("body", "dice (metric)", "latency_p95_ms (metric)"), 30, "our columns")
        until(lambda: shows(".ms-DetailsRow", "SUCCEEDED", "RUNNING"), 30, "a finished and a running trial")
        shoot("columns")

        press("Hyper-parameter")
        until(lambda: shows("svg text", "strategy", "co_search", "default", "dice"), 30, "the hyper-parameter chart")
        shoot("hyper_parameters")

        press("Intermediate result")
        until(
            lambda: running in (curves(".intermediate-graph") or []), 30, "the running trial's curve beside the others"
        )
        press("Intermediate", ".ms-DetailsRow", "RUNNING")
        until(lambda: curves(".compare-modal") == [running], 30, "the running trial's curve by itself")
        shoot("intermediate")


FAULTY = '''"""An operator that fails in another way in each trial."""
import os

from torch import nn
from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d

from glioma_nas.registry import operators

TRIAL = os.environ.get("NNI_TRIAL_SEQ_ID")
if TRIAL == "0":
    raise RuntimeError("broken at import")


@operators.register("faulty")
class Faulty(nn.Sequential):
    """A 3x3 convolution with a fault."""

    def __init__(self, in_channels, out_channels, stride):
        if TRIAL == "1":
            raise RuntimeError("broken at build")
        super().__init__(
            MutableConv2d(in_channels, out_channels, 3, stride, 1, bias=False), MutableBatchNorm2d(out_channels)
        )

    def forward(self, image):
        if TRIAL == "2":
            raise RuntimeError("broken in forward")
        return super().forward(image) * (float("nan") if TRIAL == "3" else 1.0)
'''


def test_plugin_that_raises_fails_its_trial_with_the_reason(nni: Nni, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    search = {**TINY_RUN["search"], "space_options": {"preset": "tiny", "operators": ["skip", "faulty"]}}
    run = write_run(tmp_path, plugins=["faulty.py"], search=search, train=TRAINING)
    experiment = tmp_path / "experiment"
    nni.call("nni", "config", run, "--out", experiment, "--kind", "architecture", "--trials", 5, "--tuner", "Random")
    record = nni.start_plainly(experiment, guard=install_guard(tmp_path / "site").parent)
    nni.wait(record, timeout_s=240)
    trials = sorted(nni.trials(record), key=lambda trial: int(trial["sequenceId"]))
    reasons = [(output_of(trial) / "trial.stderr").read_text().strip().splitlines()[-1] for trial in trials[:4]]
    assert [trial["status"] for trial in trials] == ["FAILED"] * 4 + ["SUCCEEDED"]
    for reason, word in zip(reasons, ("at import", "at build", "in forward", "not a finite number"), strict=True):
        assert reason.startswith("trial failed: ") and word in reason
