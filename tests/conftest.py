"""What the end-to-end tests share: the smallest study, and a finished copy of it."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# A shell that runs the tests in the background has Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("COMPASSION_SHARED_DATA", ROOT.parent / "shared" / "data"))

# The smoke preset at the size of a crash test: every stage of the graph, seconds in all.
CRASH_SIZE = ("midtrain.rows=60", "midtrain.held_out=12", "midtrain.steps=2", "sft.rows=60", "sft.held_out=12", "sft.steps=2", "generation.max_new_tokens=24", "arms=[sft-help, sft-code, sft-help@base, sft-code@base]",
              "benchmarks.anima.size={en: 3, es: 2, ms: 2}", "benchmarks.moru.size={en: 3, es: 2, ms: 2}", "benchmarks.leak.size={en: 2}", "statistics.resamples=500")


def settings(*more: str) -> list[str]:
    "`--set` words for the crash-test size, with more laid over it."
    return [word for setting in (*CRASH_SIZE, *more) for word in ("--set", setting)]


def command(out: Path, *more: str, report: bool = False) -> list[str]:
    "The command line that runs the crash-test study into a folder; the report, seconds of drawing, only where it is wanted."
    return [sys.executable, "-m", "compassion_repro.cli", "run", "--preset", "smoke", "--out", str(out), *([] if report else ["--no-report"]), *more]


def run_study(out: Path, *more_settings: str, words: tuple[str, ...] = (), report: bool = False, **options) -> subprocess.CompletedProcess:
    "Run it to its end, with the output captured."
    return subprocess.run([*command(out, *words, report=report), *settings(*more_settings)], capture_output=True, text=True, **options)


def assert_one_line(done, *parts: str):
    "A refusal: status 2 and exactly one line on stderr that holds the given words."
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("compassion-repro: "), done.stderr
    for part in parts: assert part in done.stderr, done.stderr


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Path:
    "A finished crash-test study, one for all workers; copy it before changing it."
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    out = shared / "finished" / "study"
    with FileLock(shared / "finished.lock"):
        if not (out.parent / "stdout.txt").exists():
            done = run_study(out, report=True)
            assert done.returncode == 0, done.stderr[-3000:]
            (out.parent / "stdout.txt").write_text(done.stdout)
    return out


@pytest.fixture
def study_copy(finished, tmp_path) -> Path:
    "A copy of the finished study, to be damaged."
    return Path(shutil.copytree(finished, tmp_path / "study"))
