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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from conftest import command, settings
from judge_server import JUDGE, PaidJudge, kept_replies

PAID = (f"judge={JUDGE}", "threads=1")
RESULTS = (
    "claims.json",
    "study.yaml",
    *(f"{name}.parquet" for name in ("answers", "grades", "scores", "margin", "kl")),
)
UNCOMPARED = ("manifest.json", ".eval", ".lock")  # measured times stand in manifests and in Inspect's logs


def start(out: Path, *more: str, environment: dict = {}, words: tuple[str, ...] = ()) -> subprocess.Popen:
    "Start the study in a process group of its own; what it prints goes into a file beside it."
    out.parent.mkdir(parents=True, exist_ok=True)
    log = (out.parent / f"{out.name}.log").open("a")
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
    "What a killed study was doing, told from what it left."
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
            found[str(name)] = hashlib.sha256(file.read_bytes()).hexdigest()
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
    record, began, run, kept, before = Killed(number), time.perf_counter(), f"{out.parent.name}", set(), {}
    for attempt in range(len(delays) + 1):
        process, started = start(out, *more, environment=judge.environment(run, attempt)), time.perf_counter()
        if attempt < len(delays):
            try:
                process.wait(delays[attempt])
            except subprocess.TimeoutExpired:
                kill(process)
            else:
                return time.perf_counter() - started
        else:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                kill(process)
                record.failed = f"did not end in {timeout:.0f} s"
            if process.returncode and not record.failed:
                record.failed = (out.parent / f"{out.name}.log").read_text().strip().splitlines()[-1][:300]
        asked = judge.calls(run, attempt)
        record.paid += asked.total()
        record.paid_twice += sum(count for ref, count in asked.items() if ref in kept) + sum(
            count - 1 for ref, count in asked.items() if ref not in kept
        )
        now = manifests(out)
        record.repeated += [name for name, text in before.items() if name in now and now[name] != text]
        record.lost += [name for name in before if name not in now]
        before, kept = now, kept | kept_replies(out / "judge-replies.sqlite")
        if attempt < len(delays):
            record.moments.append(round(delays[attempt], 2))
            record.phases.append(phase(out))
            record.whole.append(len(now))
            record.half += [name for name, place in stage_folders(out).items() if name not in now]
            cut_off = set(asked) - kept
            record.in_flight += len(cut_off)
            record.answered_in_flight += len(cut_off & set(judge.answered[run, str(attempt)]))
    sent = Counter()
    for attempt in range(len(delays) + 1):
        sent.update(set(judge.calls(run, attempt)))
    record.asked_again = sum(count - 1 for count in sent.values() if count > 1)
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


def stages_told(log: Path) -> Counter:
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
    log = out.parent / f"{out.name}.log"
    stages, asked = stages_told(log), judge.calls(run, 0) + judge.calls(run, 1)
    refusals = [
        line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("compassion-repro: ")
    ]
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


def lost_worker(
    out: Path, seed: int, reference: dict[str, object], words: tuple[str, ...], timeout: float = 900
) -> dict:
    """A study on Ray whose worker is killed in the middle of a stage: that stage is run again, everything
    else once.
    """
    import psutil

    process, struck, running, rng = start(out, words=words), "", [], random.Random(seed)
    wait_until = (
        rng.uniform(0.3, 0.6) * 24 * (int(words[words.index("--seeds") + 1]) if "--seeds" in words else 1)
    )
    while process.poll() is None and not struck:
        working = [
            p
            for p in psutil.process_iter(["cmdline"])
            if (p.info["cmdline"] or [""])[0].startswith("ray::seed-")
        ]
        working = [
            p
            for p in working
            if any(
                (out / p.info["cmdline"][0].removeprefix("ray::")).parent.glob(
                    f".{Path(p.info['cmdline'][0]).name}.partial*"
                )
            )
        ]
        if working and len(manifests(out)) >= wait_until:
            victim = rng.choice(working)
            struck, running = (
                victim.info["cmdline"][0].removeprefix("ray::"),
                [p.info["cmdline"][0].removeprefix("ray::") for p in working],
            )
            victim.kill()
        time.sleep(0.2)
    status, log = process.wait(timeout), (out.parent / f"{out.name}.log").read_text(encoding="utf-8")
    stages, again, different = (
        stages_told(out.parent / f"{out.name}.log"),
        [f"seed-{seed}/{stage}" for seed, stage in re.findall(r"seed (\d+), (\S+): started again", log)],
        differences(out, reference),
    )
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


def summary(records: list[Killed]) -> dict:
    "The counts of all runs."

    def total(name):
        return sum(len(v) if isinstance(v := getattr(r, name), list) else v for r in records)

    counts = {
        name: total(name)
        for name in (
            "lost",
            "repeated",
            "half",
            "different",
            "paid",
            "paid_twice",
            "in_flight",
            "answered_in_flight",
            "asked_again",
        )
    }
    phases = Counter(p for r in records for p in r.phases)
    return {
        "runs": len(records),
        "kills": sum(len(r.moments) for r in records),
        "identical": sum(r.good for r in records),
        **counts,
        "failed": sum(bool(r.failed) for r in records),
        "phases": dict(phases.most_common()),
        "stages_in_place": sum(sum(r.whole) for r in records),
        "seconds_at_kill": [r.moments for r in records],
        "bad": [asdict(r) for r in records if not r.good],
    }
