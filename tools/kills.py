"""Studies killed with SIGKILL at random moments and started again: what was lost, repeated, half used or paid
twice, counted from outside the package.

Nothing here asks the package how it fared: stages are counted in the folder, calls at the judge's end,
results by comparing files with those of an uninterrupted run.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import psutil
from conftest import command, settings
from judge_server import JUDGE, PaidJudge, kept_replies

PAID = (f"judge={JUDGE}", "threads=1")
RESULTS = (
    "claims.json",
    "study.yaml",
    *(f"{name}.parquet" for name in ("answers", "grades", "scores", "margin", "kl")),
)
UNCOMPARED = ("manifest.json", ".eval", ".lock")  # manifests and Inspect's logs contain measured times


def start(out: Path, *more: str, environment: dict = {}, words: tuple[str, ...] = ()) -> subprocess.Popen:
    "Start the study in a separate process group; what it prints goes into a file next to it."
    out.parent.mkdir(parents=True, exist_ok=True)
    log = log_of(out).open("a")
    return subprocess.Popen(
        [*command(out, "--yes", *words), *settings(*more)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def kill(process: subprocess.Popen):
    "No warning, and none of its children left."
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stage_folders(study: Path) -> dict[str, Path]:
    "The artifacts that are in place: everything of a seed that is not hidden."
    return {str(p.relative_to(study)): p for p in sorted(study.glob("seed-*/[!.]*")) if p.is_dir()}


def is_whole(place: Path) -> bool:
    "Whether every file that a manifest lists is there in its full length."
    try:
        files = json.loads((place / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    sizes = {name: entry if isinstance(entry, int) else entry["bytes"] for name, entry in files.items()}
    return bool(sizes) and all(
        (place / name).is_file() and (place / name).stat().st_size == size for name, size in sizes.items()
    )


def manifests(study: Path) -> dict[str, str]:
    """The manifest of every whole artifact; it holds measured times, so a stage that was run again has
    another.
    """
    return {
        name: (place / "manifest.json").read_text(encoding="utf-8")
        for name, place in stage_folders(study).items()
        if is_whole(place)
    }


def phase(study: Path) -> str:
    "What a killed study was doing, by what it left."
    running = [p.name.strip(".").removesuffix(".partial") for p in study.glob("seed-*/.*.partial")]
    if running:
        return re.sub(r"^(answers|eval|probe|sft|grpo)-.*", r"\1", running[0])
    if not study.exists() or not stage_folders(study):
        return "start-up"
    return (
        "tables, claims"
        if (study / "answers.parquet").exists() or len(stage_folders(study)) >= 24
        else "between stages or start-up again"
    )


def untimed(content: bytes) -> bytes:
    "A file's content without the time at which a study's rules were registered: two studies differ in it."
    return re.sub(rb'("?registered"?: )["\']?\d{4}-\d\d-\d\dT[\d:+]+["\']?', rb"\1-", content)


def contents(study: Path) -> dict[str, object]:
    "Every result of a study by its name: tables by value, all other files by their bytes."
    found = {}
    for file in sorted(p for p in study.rglob("*") if p.is_file()):
        name = file.relative_to(study)
        if not name.parts[0].startswith("seed-") and str(name) not in RESULTS:
            continue
        if str(name).endswith(UNCOMPARED) or "logs" in name.parts:
            continue
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
            found[str(name)] = hashlib.sha256(
                table.drop(columns="study", errors="ignore")
                .to_json(orient="split", double_precision=15)
                .encode()
            ).hexdigest()
        else:
            found[str(name)] = hashlib.sha256(untimed(file.read_bytes())).hexdigest()
    return found


def differences(study: Path, reference: dict[str, object]) -> list[str]:
    "Names of results that are missing, that nobody asked for, or that are not the reference's."
    mine = contents(study)
    return sorted(name for name in mine.keys() | reference.keys() if mine.get(name) != reference.get(name))


@dataclass
class Killed:
    "What became of one study that was killed."

    number: int
    moments: list[float] = field(default_factory=list)  # seconds after the start of each killed process
    phases: list[str] = field(default_factory=list)  # what it was doing
    whole: list[int] = field(default_factory=list)  # stages in place at each kill
    half: list[str] = field(default_factory=list)  # artifacts in place that were not whole
    repeated: list[str] = field(default_factory=list)  # stages in place before a kill and run again after it
    lost: list[str] = field(default_factory=list)  # stages in place before a kill and missing at the end
    different: list[str] = field(default_factory=list)  # results that are not those of the uninterrupted run
    paid: int = 0  # calls the judge was sent
    paid_twice: int = 0  # calls for a reply that was kept already
    in_flight: int = 0  # calls that a kill cut off: sent, no reply kept
    # of them: the judge wrote its reply, to a process that may have been dead: an upper bound
    answered_in_flight: int = 0
    asked_again: int = 0  # of those in flight: asked again later, because nothing could be known of them
    failed: str = ""  # why the last process did not end well
    wall_seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (
            self.half or self.repeated or self.lost or self.different or self.paid_twice or self.failed
        )

    def count_calls(self, asked: Counter, kept: set[str]):
        "The calls of one process; `kept` are the replies that there were before it."
        self.paid += asked.total()
        self.paid_twice += sum(count if ref in kept else count - 1 for ref, count in asked.items())

    def compare(self, before: dict[str, str], now: dict[str, str]):
        "The manifests before and after one process."
        self.repeated += [name for name, text in before.items() if name in now and now[name] != text]
        self.lost += [name for name in before if name not in now]

    def note_kill(self, out: Path, delay: float, whole: dict[str, str]):
        "What a kill left in the study's folder."
        self.moments.append(round(delay, 2))
        self.phases.append(phase(out))
        self.whole.append(len(whole))
        self.half += [name for name in stage_folders(out) if name not in whole]

    def count_in_flight(self, cut_off: set[str], answered: Iterable[str]):
        "The calls that a kill cut off, and those of them that the judge had answered."
        self.in_flight += len(cut_off)
        self.answered_in_flight += len(cut_off & set(answered))


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    "Whether a process ends in time; one that does not is killed."
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return False
    return True


def log_of(out: Path) -> Path:
    "What the commands on a study printed, see `start`."
    return out.parent / f"{out.name}.log"


def failure(process: subprocess.Popen, out: Path, timeout: float) -> str:
    "Why a process that should finish a study did not; empty where it did."
    if not ends_within(process, timeout):
        return f"did not end in {timeout:.0f} s"
    return log_of(out).read_text().strip().splitlines()[-1][:300] if process.returncode else ""


def killed_study(
    number: int,
    out: Path,
    delays: list[float],
    reference: dict[str, object],
    judge: PaidJudge,
    more: tuple[str, ...] = PAID,
    timeout: float = 400,
) -> Killed | float:
    """Run a study, kill it after each delay and start it again, then let it finish; where a process ended
    before its kill, the seconds that it took.
    """
    record, began, run = Killed(number), time.perf_counter(), out.parent.name
    kept, before, sent = set(), {}, Counter()
    for attempt, delay in enumerate([*delays, None]):
        process, started = start(out, *more, environment=judge.environment(run, attempt)), time.perf_counter()
        if delay is None:
            record.failed = failure(process, out, timeout)
        elif ends_within(process, delay):
            return time.perf_counter() - started
        asked, now = judge.calls(run, attempt), manifests(out)
        record.count_calls(asked, kept)
        record.compare(before, now)
        before, kept = now, kept | kept_replies(out / "judge-replies.sqlite")
        sent.update(set(asked))
        if delay is not None:
            record.note_kill(out, delay, now)
            record.count_in_flight(set(asked) - kept, judge.answered[run, str(attempt)])
    record.asked_again = sum(count - 1 for count in sent.values())
    if not record.failed:
        record.different = differences(out, reference)
    record.wall_seconds = round(time.perf_counter() - began, 1)
    return record


def moments(runs: int, seed: int) -> list[list[float]]:
    """When to kill, as shares of an uninterrupted run's length: one moment a run, a random one in each of as
    many equal parts as there are runs; every fourth run is killed a second time.
    """
    draws = []
    for number in range(runs):
        rng = random.Random(f"{seed}-{number}")
        shares = [(number + rng.random()) / runs]
        if number % 4 == 3:
            shares.append(0.1 + rng.random() * 0.7 * (1 - shares[0]))
        draws.append(shares)
    return draws


def stages_printed(log: Path) -> Counter:
    "How often each stage was finished, by the lines that the commands printed."
    return Counter(
        re.findall(r"^\[\d+/\d+\] (seed \d+, [^:]+): [\d.]+ s", log.read_text(encoding="utf-8"), flags=re.M)
    )


def two_at_once(
    number: int,
    out: Path,
    delay: float,
    reference: dict[str, object],
    judge: PaidJudge,
    more: tuple[str, ...] = PAID,
    timeout: float = 600,
) -> dict:
    """Two commands on one study, the second a moment after the first: one works, the other waits or leaves
    with a line, and nothing is done twice.
    """
    run, processes = out.parent.name, []
    for place in (0, 1):
        processes.append(start(out, *more, environment=judge.environment(run, place)))
        if not place:
            time.sleep(delay)
    statuses = [process.wait(timeout) for process in processes]
    log = log_of(out)
    stages, asked = stages_printed(log), judge.calls(run, 0) + judge.calls(run, 1)
    lines = log.read_text(encoding="utf-8").splitlines()
    refusals = [line for line in lines if line.startswith("compassion-repro: ")]
    twice = {
        "stages_twice": [name for name, count in stages.items() if count > 1],
        "calls_twice": asked.total() - len(asked),
        "different": differences(out, reference),
    }
    good = (
        sorted(statuses) in ([0, 0], [0, 2])
        and len(refusals) == statuses.count(2)
        and sum(stages.values()) == len(manifests(out))
        and not any(twice.values())
    )
    return {
        "number": number,
        "delay": round(delay, 2),
        "statuses": statuses,
        "said": refusals,
        "stages": sum(stages.values()),
        **twice,
        "good": good,
    }


def busy_workers(out: Path) -> dict[str, psutil.Process]:
    "Ray's workers by the stage that each has begun: its unfinished folder is there."
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith("ray::seed-"):
            stage = title.removeprefix("ray::")
            if any((out / stage).parent.glob(f".{Path(stage).name}.partial*")):
                found[stage] = process
    return found


def kill_worker(
    process: subprocess.Popen,  # the command
    out: Path,  # its study
    stages: float,  # in place before the kill
    rng: random.Random,  # draws the worker
) -> tuple[str, list[str]]:  # the stage that was cut off, and all that were running; none where nothing was
    "Kill one of Ray's workers in the middle of a stage."
    while process.poll() is None:
        workers = busy_workers(out)
        if workers and len(manifests(out)) >= stages:
            struck = rng.choice(list(workers))
            workers[struck].kill()
            return struck, list(workers)
        time.sleep(0.2)
    return "", []


def lost_worker(
    out: Path, seed: int, reference: dict[str, object], words: tuple[str, ...], timeout: float = 900
) -> dict:
    """A study on Ray whose worker is killed in the middle of a stage: that stage is run again, everything
    else once.
    """
    seeds = int(words[words.index("--seeds") + 1]) if "--seeds" in words else 1
    process, rng = start(out, words=words), random.Random(seed)
    struck, running = kill_worker(process, out, rng.uniform(0.3, 0.6) * 24 * seeds, rng)
    status, log = process.wait(timeout), log_of(out).read_text(encoding="utf-8")
    again = [
        f"seed-{number}/{stage}" for number, stage in re.findall(r"seed (\d+), (\S+): started again", log)
    ]
    stages, different = stages_printed(log_of(out)), differences(out, reference)
    # what had only been handed to the lost process had not begun
    cost = [stage for stage in again if stage in running]
    good = status == 0 and bool(struck) and cost == [struck] and set(stages.values()) == {1} and not different
    return {
        "struck": struck,
        "running": running,
        "status": status,
        "again": again,
        "stages": sum(stages.values()),
        "different": different,
        "good": good,
        "said": log.strip().splitlines()[-1][:300] if status else "",
    }


COUNTED = (  # fields of `Killed` that are summed
    *("lost", "repeated", "half", "different"),
    *("paid", "paid_twice", "in_flight", "answered_in_flight", "asked_again"),
)


def summary(records: list[Killed]) -> dict:
    "The counts of all runs."

    def total(name):
        values = [getattr(record, name) for record in records]
        return sum(len(value) if isinstance(value, list) else value for value in values)

    phases = Counter(phase for record in records for phase in record.phases)
    return {
        "runs": len(records),
        "kills": sum(len(record.moments) for record in records),
        "identical": sum(record.good for record in records),
        **{name: total(name) for name in COUNTED},
        "failed": sum(bool(record.failed) for record in records),
        "phases": dict(phases.most_common()),
        "stages_in_place": sum(sum(record.whole) for record in records),
        "seconds_at_kill": [record.moments for record in records],
        "bad": [asdict(record) for record in records if not record.good],
    }
