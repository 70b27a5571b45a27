"""A share of `make faults`, on copies of one finished study: killed at random moments, and read after damage.

That the counting itself can fail is tested, too.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import damage
import kills
import pandas as pd
import pytest
from conftest import FORKS, command, copy_study, settings
from damage_cases import all_cases
from forks import COMMAND, Job
from judge_server import JUDGE, PaidJudge, kept_replies, reference
from kills import contents, differences, is_whole, killed_study, manifests, phase


class Forked(Job):
    "What `kills` uses of a process, of a fork that leads a group of processes."

    def __init__(self, job: Job, log: Path):
        super().__init__(job.pid, job.folder)
        self.log = log

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 600)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("the study", timeout)
            time.sleep(0.02)
        self.log.write_text("".join((self.folder / name).read_text() for name in ("stdout", "stderr")))
        return self.returncode


def start_fork(out: Path, *more: str, environment: dict = {}) -> Forked:
    "As `kills.start`, but that the libraries are loaded, so that the kill strikes the study's own work."
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [*command(out, "--yes"), *settings(*more)][3:]
    job = FORKS.start(f"import os; os.setsid(); {COMMAND}", words, environment=dict(os.environ) | environment)
    return Forked(job, kills.log_of(out))


def test_killed_twice_a_study_ends_as_if_nothing_had_happened(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "start", start_fork)
    rng = random.Random(6)
    delays = [rng.uniform(1, 4), rng.uniform(2, 4)]
    with PaidJudge() as judge:
        for attempt in range(6):  # on a machine that is done before the kill, sooner
            study = copy_study(finished, tmp_path / str(attempt) / "study")
            for stage in ("mid", "sft-help", "eval-sft-code@base", "probe-base"):
                shutil.rmtree(study / "seed-1" / stage)
            record = killed_study(
                0, study, [delay / 2**attempt for delay in delays], contents(finished), judge, more=()
            )
            if not isinstance(record, float):
                break
    assert not isinstance(record, float), f"it had ended, after {record} s, before it was killed"
    assert record.good and len(record.phases) == 2 and min(record.whole) >= 20, record


def walked(*words: str) -> dict:
    "What `tests/walk.py` found in the making of a study."
    walk = [sys.executable, Path(__file__).resolve().parents[1] / "walk.py", "creation", *words]
    found = json.loads(subprocess.run(walk, capture_output=True, text=True).stdout)
    assert not found["bad"] and found["operations"] >= 20, found
    return found


@pytest.mark.long
def test_killed_or_failing_during_its_making_a_study_is_made_by_the_next_start():
    assert walked("--most", "16")["struck"] == 16


@pytest.mark.long
def test_killed_or_failing_at_any_file_operation_a_study_is_made_by_the_next_start():
    found = walked("--sample", "--workers", "2")
    assert found["struck"] == 2 * found["operations"], found


CASES = {  # the first of each is quick enough for `make test`
    "weights": ("zeros", "gone"),
    "answers": ("flip", "other"),
    "grades and scores": ("empty",),
    "manifests": ("digit", "utf-16"),
    "tables": ("cut", "other"),
    "claims": ("digit", "garbage"),
    "study.yaml": ("garbage",),
    "data files": ("utf-16", "zeros", "folder"),
    "benchmark folders": ("cut",),
    "model folders": ("empty", "other"),
    "preset files": ("utf-16",),
    "--set values": ("wrong",),
}
FIRST = [(family, hows[0]) for family, hows in CASES.items()]
FURTHER = [
    pytest.param(family, how, marks=pytest.mark.long) for family, hows in CASES.items() for how in hows[1:]
]


@pytest.fixture(scope="module")
def sound(finished, tmp_path_factory):
    "The folders that are damaged."
    bases = tmp_path_factory.mktemp("sound")
    damage.make_study(bases / "study", finished)
    damage.make_inputs(bases / "inputs")
    return bases


@pytest.mark.parametrize("family, how", [*FIRST, *FURTHER])
def test_damaged_inputs_are_refused_or_repaired(family, how, sound, tmp_path):
    case = next(case for case in all_cases() if (case.family, case.how) == (family, how))
    done = damage.try_case(case, sound, 1, tmp_path)
    assert not done["bad"], done


# ---- the counting


def test_a_study_that_is_not_whole_is_seen(study_copy, finished):
    sound, place = contents(finished), study_copy / "seed-1" / "mid"
    assert not differences(study_copy, sound) and is_whole(place) and len(manifests(study_copy)) == 24
    with (place / "model.safetensors").open("r+b") as file:
        file.seek(9000)
        file.write(b"\xff\xfe")
    table = pd.read_parquet(study_copy / "scores.parquet")
    table.assign(score=1 - table.score).to_parquet(study_copy / "scores.parquet")
    (study_copy / "claims.json").unlink()
    assert differences(study_copy, sound) == ["claims.json", "scores.parquet", "seed-1/mid/model.safetensors"]
    (place / "rows.jsonl").write_text("")
    assert not is_whole(place) and len(manifests(study_copy)) == 23 and phase(study_copy) == "tables, claims"
    (study_copy / "seed-1" / ".eval-mid.partial").mkdir()
    assert phase(study_copy) == "eval"


def ask(judge, process, question):
    "One call, as a client makes it."
    body = json.dumps({"model": "judge", "messages": [{"role": "user", "content": question}]}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(
            judge.environment("run", process)["STANDIN_BASE_URL"] + "/chat/completions", body
        )
    ) as reply:
        return reference(body), json.load(reply)["choices"][0]["message"]["content"]


def test_the_stand_in_judge_counts_what_it_is_asked(tmp_path):
    with PaidJudge(latency=0) as judge:
        (one, said), (two, _) = ask(judge, 0, "May I?"), ask(judge, 0, "May they?")
        assert said.startswith(f"Ref {one}.") and ask(judge, 1, "May I?") == (one, said)
        assert judge.calls("run", 0) == Counter([one, two]) and judge.calls("run", 1) == Counter([one])
        from inspect_ai.model import ModelOutput

        from compassion_repro.evaluation.replies import Replies, reply_key

        replies = Replies(tmp_path / "replies.sqlite")
        replies.put(reply_key(JUDGE, {}, "May I?"), JUDGE, ModelOutput.from_content("judge", said))
        assert kept_replies(tmp_path / "replies.sqlite") == {one} and kept_replies(tmp_path / "none") == set()


def test_a_call_for_a_reply_that_was_kept_counts_as_paid_twice(study_copy, finished, monkeypatch):
    "A judge whose every call was kept before: the count must see that they are made again."
    script = """if True:
        import os, sys, time, urllib.request
        urllib.request.urlopen(os.environ["STANDIN_BASE_URL"] + "/chat/completions", b'{"messages": [{"content": "May I?"}]}').read()
        print("asked", flush=True)
        time.sleep(600 * ("/0/v1" in os.environ["STANDIN_BASE_URL"]))
    """

    def start(out, *more, environment):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,
        )
        process.stdout.readline()  # however slow the machine is: it is killed after the call
        return process

    monkeypatch.setattr(kills, "start", start)
    monkeypatch.setattr(
        kills, "kept_replies", lambda file: {reference(b'{"messages": [{"content": "May I?"}]}')}
    )
    with PaidJudge(latency=0) as judge:
        record = killed_study(0, study_copy, [0.1], contents(finished), judge, more=())
    assert record.paid == 2 and record.paid_twice == 1 and not record.good
