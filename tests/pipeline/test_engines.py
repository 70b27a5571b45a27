"""The engines: what runs side by side on Ray is what runs here, and a lost process, bad input or an interrupt
cost what runs and nothing else.
"""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
from conftest import CRASH_SIZE
from test_study import same_scores, table

from compassion_repro.core import signals
from compassion_repro.core.errors import InputError
from compassion_repro.core.files import hidden
from compassion_repro.pipeline import ray_cluster, ray_engine, run
from compassion_repro.pipeline.progress import Progress
from compassion_repro.presets import load_preset
from compassion_repro.store.folder import Study
from compassion_repro.store.graph import graph

# not imported here: that would be before its token is made
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
PRESET = load_preset("smoke", CRASH_SIZE)


@pytest.fixture(scope="module")
def cluster():
    """A Ray of four processors, two stages at a time, for all tests here: its processes keep their libraries.

    It leaves SIGTERM to us, and ends whole.
    """
    before, others = signal.getsignal(signal.SIGTERM), psutil.Process().children(recursive=True)
    with ray_cluster.connected("4", 1) as connected:
        assert signal.getsignal(signal.SIGTERM) is before
        yield connected
        # what earlier files of this worker left is not ours; a process is known by its number and its start
        started = [p for p in psutil.Process().children(recursive=True) if p not in others]
    assert started and not [
        p for p in psutil.wait_procs(started, timeout=300)[1] if p.status() != psutil.STATUS_ZOMBIE
    ]


def without(study, *stages):
    "Take stages out of a study, with their places."
    for stage in stages:
        shutil.rmtree(study / "seed-1" / stage)


def running(stage: str) -> psutil.Process | None:
    "The process of our Ray that runs a stage; it carries the stage's place in its title."
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] == [f"ray::seed-1/{stage}"]:
                return process


def strike(study, stage: str, how: int, whom: psutil.Process | None = None, seconds: float = 600):
    "Send a signal to the process that runs a stage, or to another, once the stage is at work."

    def wait(end=time.monotonic() + seconds):
        while not list(study.glob(f"seed-1/.{stage}.partial*")) and time.monotonic() < end:
            time.sleep(0.02)
        (whom or running(stage)).send_signal(how)

    threading.Thread(target=wait, daemon=True).start()


def started_again(lines):
    return [line.split(": ")[0] for line in lines if "started again" in line]


def finished_stages(lines):
    return sorted(line.split("] seed 1, ")[1].split(": ")[0] for line in lines if line.startswith("["))


@pytest.mark.long
def test_ray_ends_with_what_the_local_engine_ends_with(cluster, study_copy, finished):
    """Two arms side by side; the process that trains one is killed.

    It costs that stage, which is run again; every other stage runs once, and the results are those of a run
    without Ray.
    """
    gone = ["sft-help", "answers-sft-help", "eval-sft-help", "sft-code", "probe-base"]
    without(study_copy, *gone)
    before = {p: p.stat().st_mtime_ns for p in study_copy.rglob("manifest.json")}
    said, told = [], []
    strike(study_copy, "sft-code", signal.SIGKILL)
    run.run(PRESET, study_copy, 1, said.append, told.append, page=False, engine="ray")
    assert "19 done, 5 to run" in said[0] and finished_stages(said) == sorted(gone)
    assert started_again(said) == ["seed 1, sft-code"]
    assert before == {p: p.stat().st_mtime_ns for p in before}  # what was finished was left alone
    assert (
        same_scores(finished, study_copy)
        and (table(finished, "answers").text == table(study_copy, "answers").text).all()
    )
    assert any("2 running" in line for line in told), told
    assert not list(study_copy.rglob(".*.partial"))


def test_what_is_done_is_not_done_again_on_a_worker(cluster, study_copy):
    "A machine can be lost after a stage was put in its place and before Ray heard of it."
    study, stages, said, told = Study(study_copy), graph(PRESET), [], []
    before = {p: p.stat().st_mtime_ns for p in study_copy.rglob("*")}
    ray_engine.run_on_ray(study, PRESET, stages, Progress(stages, said.append, told.append), lambda *_: None)
    assert len(finished_stages(said)) == 24 and not any("running" in line for line in told)
    assert before == {p: p.stat().st_mtime_ns for p in study_copy.rglob("*")}


def test_bad_input_in_a_stage_ends_the_run_with_its_line(cluster, study_copy, tmp_path):
    """A file that was there when it was checked and is gone when its stage runs; what runs beside it is
    ended, what is finished stays.
    """
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Name a colour.", "response": "Blue."}\n' * 40)
    preset = load_preset("smoke", [*CRASH_SIZE, f"data.sft-help={rows}", "data.sft-code=world:code"])
    study = Study.create(tmp_path / "own", preset)
    (tmp_path / "own" / "seed-1").mkdir()
    for name in ("base", "mid", "answers-base", "answers-mid"):
        shutil.copytree(study_copy / "seed-1" / name, tmp_path / "own" / "seed-1" / name)
    stages, said = (
        [
            s
            for s in graph(preset)
            if not study.done(s) and s.id in ("sft-help", "answers-sft-help", "eval-mid")
        ],
        [],
    )

    def lose(study, preset, say):
        rows.unlink()

    with pytest.raises(InputError, match="rows.jsonl") as refused:
        ray_engine.run_on_ray(study, preset, stages, Progress(stages, said.append), lose)
    assert "\n" not in str(refused.value)
    assert study.done(next(s for s in graph(preset) if s.id == "mid")) and not list(
        study.folder.rglob(".*.partial")
    )
    assert not (study.folder / "seed-1" / "sft-help").exists()


def test_a_process_that_was_interrupted_is_not_used_again(cluster, tmp_path):
    "An interrupt in the middle of an import leaves half a library behind, on which the next task would fail."

    def work(place, seconds):
        with ray_engine._ends_when_interrupted():
            place.write_text(str(os.getpid()))
            while seconds > 0:
                time.sleep(0.1)
                seconds -= 0.1
            return os.getpid()

    task, place = cluster.remote(num_cpus=4)(work), tmp_path / "here"
    cut = task.remote(place, 120)
    while not (place.exists() and place.read_text()):
        time.sleep(0.05)
    first = int(place.read_text())
    cluster.cancel(cut)
    assert cluster.wait([cut], timeout=60)[0]
    assert cluster.get(task.remote(place, 0)) != first


def test_bad_input_in_the_check_is_one_line(cluster, tmp_path, monkeypatch):
    # nothing waits for a check that failed: cancelling what Ray hands out at that moment aborts the driver
    monkeypatch.setattr(ray_engine, "_submit", None)
    preset = load_preset("smoke", [*CRASH_SIZE, "models.base=" + str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as refused:
        run.run(preset, tmp_path / "study", engine="ray", say=lambda line: None)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_the_jail_holds_in_a_worker(cluster):
    from compassion_repro.sandbox import jail

    if jail.level() == "none":
        pytest.skip("no jail on this machine")

    def tried():
        from compassion_repro.sandbox import jail

        return jail.level(), [
            result.passed
            for result in jail.run_many(
                [
                    ("def f(x): return x + 1", "assert f(1) == 2"),
                    (jail.PROBE, "assert escapes('/proc/self/environ') == []"),
                    ("open('/etc/written', 'w')", ""),
                ]
            )
        ]

    level, results = cluster.get(cluster.remote(num_cpus=1)(tried).remote())
    assert (level, results) == tried() and results[0] and not results[2]


def test_four_stages_share_a_gpu(cluster, tmp_path):
    """What a preset says reaches Ray's own tasks, of which four fit on a GPU; a made-up one, since nothing
    here has any.
    """
    preset = load_preset("smoke", [*CRASH_SIZE, "compute.gpus=0.25"])
    stages, submitted = graph(preset), {}
    asked = ray_engine._asked(cluster, preset, stages)

    class Noted:
        "A task of Ray that is not sent."

        def __init__(self, **how):
            self.how = how

        def __call__(self, function):
            self.task = cluster.remote(**self.how)(function)
            return self

        def options(self, name, **wanted):
            self.task.options(name=name, **wanted)  # Ray looks at what it is asked for
            submitted[name] = wanted["num_gpus"]
            return SimpleNamespace(remote=lambda *words: name)

    noted = SimpleNamespace(remote=Noted)
    ray_engine._submit(noted, Study(tmp_path), preset, stages, asked, None, False)
    assert {submitted[stage.place] for stage in stages if stage.kind in ("sft", "grpo", "answers")} == {0.25}
    machine = {"CPU": 64, "GPU": 1, "memory": 2**40}
    cluster_of_one = SimpleNamespace(nodes=lambda: [{"Resources": machine, "Alive": True}])
    sft = next(stage.place for stage in stages if stage.kind == "sft")
    assert ray_engine._at_once(cluster_of_one, asked[sft], True, print) == 4


def test_a_stage_that_no_machine_has_room_for_is_told(cluster):
    said = []
    assert (
        ray_engine._at_once(cluster, {"num_cpus": 2, "num_gpus": 0, "memory": 2**20}, True, said.append) == 2
    )
    with pytest.raises(InputError, match="5000 processors"):
        ray_engine._at_once(cluster, {"num_cpus": 5000, "num_gpus": 0, "memory": 2**20}, True, said.append)
    assert (
        ray_engine._at_once(cluster, {"num_cpus": 1, "num_gpus": 3, "memory": 2**20}, False, said.append) == 1
        and "waiting for one that joins" in said[0]
    )


@pytest.mark.parametrize("late", [0, 0.5, 1.5])  # seconds after which it writes again
def test_a_process_that_dies_slowly_leaves_nothing(tmp_path, late):
    """Ended by force, a stage counts as finished while its process still writes: what it leaves goes too."""
    stage = next(stage for stage in graph(PRESET) if stage.id == "sft-code")
    partial = hidden(tmp_path / stage.place, "partial")
    stop = time.monotonic() + late

    def dying():
        "Writes file after file, and makes the folder anew where it is gone."
        while time.monotonic() < stop:
            with suppress(OSError):
                partial.mkdir(parents=True, exist_ok=True)
                (partial / f"{time.monotonic()}").write_text("half")
            time.sleep(0.3)

    partial.mkdir(parents=True)
    thread = threading.Thread(target=dying)
    thread.start()
    ray_engine._clear(Study(tmp_path), [stage], quiet=1)
    thread.join()
    assert not partial.exists()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone"
)
def test_a_run_that_is_told_to_end_ends_what_runs(cluster, study_copy, monkeypatch):
    """SIGTERM at the driver: the running stage gets the interrupt, nothing half is left, what is finished
    stays, and a Ray that was there before stays too. The repeats of the signal do not cut the clearing up short.
    """
    monkeypatch.setattr(signals, "RESEND_EVERY", 0.3)
    without(study_copy, "sft-code")
    strike(study_copy, "sft-code", signal.SIGTERM, psutil.Process())
    with pytest.raises(KeyboardInterrupt):
        run.run(PRESET, study_copy, say=lambda line: None, engine="ray")
    assert not (study_copy / "seed-1" / "sft-code").exists() and not list(study_copy.rglob(".*.partial"))
    assert (
        (study_copy / "seed-1" / "eval-sft-code").exists()
        and cluster.is_initialized()
        and running("sft-code") is None
    )
