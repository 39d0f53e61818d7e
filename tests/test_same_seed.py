"""The same seed gives the same architecture in another process, with other hash seeds and other generator states."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

PROGRAM = """
import sys
from pathlib import Path
import torch
torch.manual_seed(int(sys.argv[3]))
from test_one_shot import make_co_search, make_evaluator, make_space
from glioma_nas.nni_bridge import explore, found_architectures
from glioma_nas.registry import strategies
prepared, folder = Path(sys.argv[1]), Path(sys.argv[2])
space = make_space()
if sys.argv[4] == "co_search":
    strategy = make_co_search(space, operator_relaxation="gumbel", evolution_generations=1, evolution_population=3)
else:
    strategy = strategies.get(sys.argv[4])(pretrain_epochs=1, arc_learning_rate=0.05, seed=2)
explore(space, make_evaluator(prepared, folder, epochs=2), strategy)
found = found_architectures(strategy, make_space())
print(*(f"{name}={architecture.id}" for name, architecture in sorted(found.items())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["co_search", "nni.darts"])
def test_same_seed_gives_the_same_architectures_in_every_process(tmp_path: Path, name: str) -> None:
    prepared = prepare_phantom_cohort(tmp_path / "phantom", n_patients=4, image_size_px=32)
    tests = Path(__file__).parent
    outputs = []
    for number in ("1", "2"):
        path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH"), str(tests.parent)])])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(prepared), str(tmp_path / number), number, name],
            env={**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines()[-1])
    assert outputs[0] == outputs[1] and outputs[0].startswith("student=")
    courses = [(tmp_path / number / "architecture_history.csv").read_bytes() for number in ("1", "2")]
    assert courses[0] == courses[1]
