"""Run the tests that need a GPU, and the study `smoke` on it, and write down how they went.

python tools/gpu_tests.py figures/gpu_tests.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from compassion_repro.bench.gpu import machine

TESTS = Path(__file__).parents[1] / "tests" / "training" / "test_gpu.py"


class Outcomes:
    "What became of every test."

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            self.found[name] = {"outcome": report.outcome, "seconds": round(report.duration, 1)}


def smoke() -> dict:
    "The study `smoke` through the command line, on the GPU."
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compassion_repro.cli", "run", "--preset", "smoke"]
        command += ["--set", "compute.device=cuda", "--out", str(Path(folder) / "smoke")]
        ended = subprocess.run(command, capture_output=True, text=True)
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    return {"status": ended.returncode, "seconds": round(time.perf_counter() - began, 1), "end": lines[-12:]}


def main(out: str) -> int:
    "Write the outcomes; the exit status is 0 where all passed and the study ended well."
    outcomes = Outcomes()
    status = pytest.main(["-q", "-m", "gpu", str(TESTS)], plugins=[outcomes])
    result = {"machine": machine(), "tests": outcomes.found, "smoke": smoke()}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(result["smoke"]["end"]))
    return int(status) or result["smoke"]["status"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
