"""Each notebook's own tests, one item a notebook, each in one subprocess through nbdev's test machinery.

Cells flagged as in `settings.ini` (`tst_flags`: notest, gpu, slow, net) are left out. A notebook passes only
if the subprocess says that it executed every other code cell, so that nothing can pass by not being run.
"""

import configparser
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from conftest import CRASH_SIZE, FORKS

from compassion_repro.presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not path.name.startswith("_") and ".ipynb_checkpoints" not in path.parts
)
FLAGS = configparser.ConfigParser(interpolation=None)
FLAGS.read(ROOT / "settings.ini")
FLAGS = FLAGS["DEFAULT"]["tst_flags"].split()

RUNNER = """
import json, sys
from pathlib import Path
import datasets.config, huggingface_hub.constants as hub
hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # what they load must be on this machine
from execnb.shell import CaptureShell
from nbdev.test import test_nb

executed, plain = [], CaptureShell.cell
def counted(shell, cell, *args, **options):
    if cell.cell_type == "code": executed.append(cell.source)
    return plain(shell, cell, *args, **options)
CaptureShell.cell = counted
passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[3:], basepath=sys.argv[2])
print()
print(json.dumps({"passed": passed, "executed": len(executed), "seconds": round(seconds, 1)}))
"""


def cells_to_run(path: Path) -> int:
    "Number of code cells that are not flagged, counted without nbdev."
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    sources = ["".join(cell["source"]) for cell in cells]
    flagged = re.compile(rf"^\s*#\s*\|\s*({'|'.join(FLAGS)}|eval:\s*false)\s*$", re.M)
    return sum(not flagged.search(source) and "nbdev_export(" not in source for source in sources)


def run_notebook(path: Path, folder: Path, preset: str = "smoke", seconds: int = 900) -> dict:
    "Execute a notebook in a process of its own; raises AssertionError with the notebook's error text."
    environment = os.environ | {"COMPASSION_PRESET": preset, "STUDY": str(folder / "study")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    job = FORKS.start(RUNNER, [str(path), str(ROOT), *FLAGS], folder, {"OMP_NUM_THREADS": "2"} | environment)
    stdout, stderr = job.communicate(timeout=seconds)
    status = job.returncode
    said = (stdout + stderr)[-6000:]
    try:
        result = json.loads(stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise AssertionError(
            f"{path.name}: the run ended without a result (exit status {status})\n{said}"
        ) from None
    assert status == 0 and result["passed"], f"{path.name} failed after {result['executed']} cells\n{said}"
    assert result["executed"] == cells_to_run(path), (
        f"{path.name}: {result['executed']} of {cells_to_run(path)} cells were executed\n{said}"
    )
    assert result["executed"] > 0, f"{path.name}: no cell was executed"
    return result


def write_notebook(path: Path, *sources: str) -> Path:
    cells = [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": f"cell{number}",
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        for number, source in enumerate(sources)
    ]
    if not sources:
        cells = [{"cell_type": "markdown", "id": "words", "metadata": {}, "source": "# Only words"}]
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {
                    "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
                },
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )
    return path


def test_there_are_notebooks():
    assert NOTEBOOKS and FLAGS


# What a notebook that runs a study is to run: every kind of stage, at the crash tests' size.
WALKED = (
    *CRASH_SIZE,
    "arms=[sft-help, grpo-code]",
    "grpo.max_new_tokens=24",
    "grpo.steps=2",
    "grpo.held_out=4",
    "grpo.samples=1",
)


@pytest.fixture(scope="module")
def walkthroughs(tmp_path_factory):
    """One folder for the notebooks that run a study, with their preset: a later one carries on with what an
    earlier one has finished.
    """
    folder = tmp_path_factory.mktemp("walkthroughs")
    (folder / "smoke.yaml").write_text(yaml.safe_dump(load_preset("smoke", WALKED).resolved()))
    return folder


# A study of one's own runs some twenty trainings: the chapters show each of them by itself.
LONG = ("your_study",)
ITEMS = [pytest.param(path, marks=[pytest.mark.long] * (path.stem in LONG)) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
def test_notebook(path, walkthroughs, tmp_path):
    walks = not path.stem[0].isdigit()
    loads = walks and "load_preset" in path.read_text(encoding="utf-8")  # another only asks for the name
    folder, preset = walkthroughs if walks else tmp_path, "smoke"
    if loads:
        preset = str(walkthroughs / "smoke.yaml")
    assert run_notebook(path, folder, preset)["passed"]


def test_a_good_notebook_passes_and_flagged_cells_are_left_out(tmp_path):
    flagged = [f"#| {flag}\nraise SystemError('a flagged cell was run')" for flag in FLAGS]
    offline = "from transformers.utils.hub import is_offline_mode\nassert is_offline_mode()"
    path = write_notebook(tmp_path / "good.ipynb", "x = 1", *flagged, "assert x == 1", offline)
    assert run_notebook(path, tmp_path)["executed"] == 3


@pytest.mark.parametrize(
    "sources, words",
    [
        (("x = 1", "assert x == 2, 'the sum is wrong'", "y = 1"), "the sum is wrong"),
        (("raise SystemExit(0)",), "failed after 1 cells"),
        (("import os; os._exit(0)",), "ended without a result"),
        (("#| slow\nx = 1",), "no cell was executed"),
        ((), "no cell was executed"),
    ],
)
def test_a_notebook_that_fails_or_does_not_run_is_seen_to_fail(sources, words, tmp_path):
    path = write_notebook(tmp_path / "bad.ipynb", *sources)
    with pytest.raises(AssertionError, match=words):
        run_notebook(path, tmp_path)


def test_front_matter_cannot_switch_a_notebook_off(tmp_path):
    path = write_notebook(tmp_path / "off.ipynb", "assert False")
    notebook = json.loads(path.read_text())
    notebook["cells"].insert(
        0, {"cell_type": "raw", "id": "front", "metadata": {}, "source": "---\nskip_exec: true\n---"}
    )
    path.write_text(json.dumps(notebook))
    with pytest.raises(AssertionError, match="0 of 1 cells"):
        run_notebook(path, tmp_path)


def test_a_notebook_finds_nothing_that_another_left(tmp_path):
    leaves = (
        "import os, sys, compassion_repro.study as left",
        "os.environ['LEFT'], sys.left = 'x', left",
        "1",
    )
    finds = (
        "import os, sys",
        "assert 'LEFT' not in os.environ and not hasattr(sys, 'left') and 'left' not in globals()",
        "assert not [name for name in sys.modules if name.startswith('compassion_repro')]",
    )
    for number, sources in enumerate((leaves, finds)):
        path = write_notebook(tmp_path / f"{number}.ipynb", *sources)
        assert run_notebook(path, tmp_path)["executed"] == 3


def test_a_notebook_that_hangs_is_ended(tmp_path):
    path = write_notebook(tmp_path / "hangs.ipynb", "import time; time.sleep(600)")
    with pytest.raises(TimeoutError):
        run_notebook(path, tmp_path, seconds=1)
    assert run_notebook(write_notebook(path, "x = 1"), tmp_path)["executed"] == 1
