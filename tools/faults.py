"""Fault injection: `make faults`, or `python tools/faults.py [--runs 100] [--pairs 5] [--no-ray] [--inputs N]
[--seed 1] [--workers 4] [--walk N] [--only PART ...]`.

Studies are killed at random moments and started again; everything that the package reads is damaged in turn;
a walk strikes at file operations (tests/walk.py), in a process that runs no threads. One table is printed,
and figures/faults.json keeps the counts with n, seed, machine and commit; with --only, that of the parts that
ran, each with its own machine and commit, next to the others as they were. Exit status 1 where anything was
lost, repeated, half used, paid twice, or wrong.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import damage
from damage_cases import all_cases
from judge_server import PaidJudge
from kills import (
    PAID,
    Killed,
    contents,
    differences,
    killed_study,
    lost_worker,
    moments,
    start,
    summary,
    two_at_once,
)

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    "What git prints about this checkout."
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    "The name of the processor; empty where the system does not give it."
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def machine() -> dict:
    "What the figures were measured on; no host name, no path."
    changed = bool(git("status", "--porcelain", "--", "compassion_repro"))
    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "day": time.strftime("%Y-%m-%d"),
    }


def progress_bar(console: Console) -> Progress:
    "Bars with counts, times, and how many were bad."
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"),
        console=console,
    )


def uninterrupted(folder: Path, workers: int, judge: PaidJudge) -> tuple[dict, float]:
    """Results of a study that nothing disturbs, and how long it takes while as many others run as will later;
    all of them must agree.
    """
    began = time.perf_counter()
    running = {
        n: start(folder / f"whole-{n}" / "study", *PAID, environment=judge.environment(f"whole-{n}"))
        for n in range(workers)
    }
    durations = []
    for n, process in running.items():
        if process.wait(600):
            raise SystemExit(
                f"an uninterrupted study failed: {(folder / f'whole-{n}' / 'study.log').read_text()[-500:]}"
            )
        durations.append(time.perf_counter() - began)
    results = contents(folder / "whole-0" / "study")
    for n in running:
        if different := differences(folder / f"whole-{n}" / "study", results):
            raise SystemExit(f"two uninterrupted studies differ: {different}")
        if set(judge.calls(f"whole-{n}", 0).values()) != {1}:
            raise SystemExit("an uninterrupted study asked the judge the same question twice")
    return results, statistics.median(durations)


@dataclass
class Killer:
    "Kills studies in several threads, at moments that follow the pace of the machine."

    folder: Path  # where the studies go
    results: dict  # of an uninterrupted study, see `contents`
    judge: PaidJudge  # which all of them ask
    pace: float  # seconds that an uninterrupted study takes now
    early: int = 0  # studies that ended before their kill

    def one(self, number: int, shares: list[float]) -> Killed:
        "One study: where it is faster than its kill, the pace is corrected and it is tried again."
        for attempt in itertools.count():
            out = self.folder / f"killed-{number}-{attempt}" / "study"
            delays = [share * self.pace for share in shares]
            record = killed_study(number, out, delays, self.results, self.judge)
            if not isinstance(record, Killed):
                self.early, self.pace = self.early + 1, min(record, 0.97 * self.pace)
            elif not record.good:
                return record
            shutil.rmtree(out.parent)
            if isinstance(record, Killed):
                return record


def kill_studies(killer: Killer, runs: int, seed: int, workers: int, progress: Progress) -> list[Killed]:
    "Kill as many studies as asked for and let them finish."
    text = f"studies killed (an uninterrupted one takes {killer.pace:.0f} s here)"
    bar, records = progress.add_task(text, total=runs, bad=""), []
    with ThreadPoolExecutor(workers) as pool:
        waiting = [
            pool.submit(killer.one, number, shares) for number, shares in enumerate(moments(runs, seed))
        ]
        for done in as_completed(waiting):
            records.append(done.result())
            progress.update(bar, advance=1, bad=f"{sum(not record.good for record in records)} bad")
            if not records[-1].good:
                progress.console.print(f"study {records[-1].number}: {records[-1]}")
    return sorted(records, key=lambda record: record.number)


def pair_studies(killer: Killer, pairs: int, seed: int, latest: float, progress: Progress) -> dict:
    "Two commands on one study, as often as asked for; the second starts so many seconds later at the latest."
    bar, done = progress.add_task("two commands on one study", total=pairs, bad=""), []
    for number in range(pairs):
        out = killer.folder / f"two-{number}" / "study"
        delay = random.Random(f"{seed}-two-{number}").uniform(0, latest)
        done.append(two_at_once(number, out, delay, killer.results, killer.judge))
        progress.update(bar, advance=1, bad=f"{sum(not pair['good'] for pair in done)} bad")
    return {
        "pairs": len(done),
        "good": sum(pair["good"] for pair in done),
        "left": sum(2 in pair["statuses"] for pair in done),
        "bad": [pair for pair in done if not pair["good"]],
    }


def kill_runs(runs: int, pairs: int, seed: int, workers: int, folder: Path, console: Console) -> dict:
    "Studies that are killed and finish, and two commands on one study."
    with PaidJudge() as judge, progress_bar(console) as progress:
        bar = progress.add_task("uninterrupted studies, to compare with", total=1, bad="")
        results, duration = uninterrupted(folder, workers, judge)
        progress.update(bar, completed=1)
        killer = Killer(folder, results, judge, duration)
        records = kill_studies(killer, runs, seed, workers, progress)
        two = pair_studies(killer, pairs, seed, 0.5 * duration, progress)
    return {
        "two": two,
        "seed": seed,
        "workers": workers,
        "uninterrupted_seconds": round(duration, 1),
        "ended_before_the_kill": killer.early,
        **summary(records),
    }


def ray_run(seed: int, workers: int, folder: Path, console: Console) -> dict | None:
    "Four arms and three seeds on Ray, one worker killed; None where this environment has no Ray."
    if not importlib.util.find_spec("ray") or not importlib.util.find_spec(
        "compassion_repro.pipeline.ray_engine"
    ):
        return None
    with console.status(
        f"4 arms x 3 seeds on Ray with {workers} processors, a worker killed; before it, the same here"
    ):
        if start(folder / "here" / "study", words=("--seeds", "3")).wait(1800):
            raise SystemExit((folder / "here" / "study.log").read_text()[-500:])
        return lost_worker(
            folder / "ray" / "study",
            seed,
            contents(folder / "here" / "study"),
            ("--seeds", "3", "--engine", f"ray:{workers}"),
        )


def make_sound(folder: Path) -> Path:
    "The sound folders that are damaged, made at the same time."
    making = start(folder / "plain" / "study")
    with ProcessPoolExecutor(1, get_context("spawn"), damage.prepare_worker) as pool:
        inputs, evaluation = (
            pool.submit(damage.make_inputs, folder / "sound" / "inputs"),
            pool.submit(damage.make_evaluation, folder / "sound" / "evaluation"),
        )
        inputs.result()
        evaluation.result()
        if making.wait(600):
            raise SystemExit(f"the sound study failed: {(folder / 'plain' / 'study.log').read_text()[-500:]}")
        for name, make in (("study", damage.make_study), ("half", damage.make_half)):
            pool.submit(make, folder / "sound" / name, folder / "plain" / "study").result()
    return folder / "sound"


def damage_inputs(count: int, seed: int, workers: int, folder: Path, console: Console) -> dict:
    "Damage as many inputs as asked for (all of them, or a drawn part), a case at a time in each worker."
    cases = all_cases()
    if count < len(cases):
        drawn = random.Random(seed).sample(list(enumerate(cases)), count)
        cases = [case for _, case in sorted(drawn, key=lambda pair: pair[0])]
    with progress_bar(console) as progress:
        bar = progress.add_task("sound inputs, to be damaged", total=1, bad="")
        sound, scratch = make_sound(folder), folder / "damaged"
        progress.update(bar, completed=1)
        bar, results = progress.add_task("inputs damaged", total=len(cases), bad=""), []
        scratch.mkdir()
        with ProcessPoolExecutor(workers, get_context("spawn"), damage.prepare_worker) as pool:
            waiting = [pool.submit(damage.try_case, case, sound, seed, scratch) for case in cases]
            for done in as_completed(waiting):
                results.append(done.result())
                progress.update(bar, advance=1, bad=f"{sum(bool(r['bad']) for r in results)} bad")
                if results[-1]["bad"]:
                    progress.console.print(
                        f"{results[-1]['case']}: {results[-1]['outcome']}: {results[-1]['bad']}", markup=False
                    )
    return {"seed": seed, "workers": workers, **damage.summary(sorted(results, key=lambda r: r["case"]))}


WALK = """
import json, sys
from pathlib import Path
from walk import walk_creation, walk_study
which, folder, workers, most, out = sys.argv[1:]
how = {"most": int(most)} if which == "study" else {}
tell = lambda done, of: print(done, of, flush=True)
found = {"creation": walk_creation, "study": walk_study}[which](Path(folder), int(workers), tell=tell, **how)
Path(out).write_text(json.dumps(found))
"""


def walked(which: str, most: int, workers: int, folder: Path, console: Console) -> dict:
    "Strike at the file operations of a study's creation (all, in every way) or of a whole study (a sample)."
    place, out = folder / which, folder / f"{which}.json"
    place.mkdir(parents=True)
    words = [sys.executable, "-c", WALK, which, place, workers, most, out]
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True, env=settings) as walking,
        progress_bar(console) as progress,
    ):
        bar = progress.add_task(f"file operations struck: {which}", total=None, bad="")
        for line in walking.stdout:
            done, of = map(int, line.split())
            progress.update(bar, completed=done, total=of)
    if walking.returncode:
        raise SystemExit(f"the walk through a {which} failed")
    return json.loads(out.read_text())


def walks(most: int, workers: int, folder: Path, console: Console) -> dict:
    "Both walks; each process forks one attempt after another."
    found = {which: walked(which, most, workers, folder / "walk", console) for which in ("creation", "study")}
    return {"workers": workers, **found, "bad": [bad for walk in found.values() for bad in walk.pop("bad")]}


def kill_rows(kills: dict) -> list[tuple[str, str]]:
    "Of the studies that were killed, and of two commands on one study."
    phases = ", ".join(f"{name} {count}" for name, count in kills["phases"].items())
    two = kills["two"]
    return [
        (
            "studies killed with SIGKILL and started again",
            f"{kills['runs']} ({kills['kills']} kills: {phases})",
        ),
        ("ended with the uninterrupted run's results", f"{kills['identical']} of {kills['runs']}"),
        (
            "stages in place at a kill: lost, run again",
            f"{kills['lost']}, {kills['repeated']} of {kills['stages_in_place']}",
        ),
        ("half artifacts in place", str(kills["half"])),
        ("judge calls paid twice", f"{kills['paid_twice']} of {kills['paid']:,}"),
        (
            "calls under way at a kill, no reply kept",
            f"{kills['in_flight']} (asked again: {kills['asked_again']})",
        ),
        (
            "two commands on one study: one worked, the other left or waited",
            f"{two['good']} of {two['pairs']} (left: {two['left']})",
        ),
    ]


def ray_rows(ray: dict) -> list[tuple[str, str]]:
    "Of the study on Ray."
    result = f"{ray['struck']} run again, {ray['stages']} stages once" if ray["good"] else "bad"
    return [("a Ray worker killed, 4 arms x 3 seeds", result)]


def input_rows(inputs: dict) -> list[tuple[str, str]]:
    "Of the inputs that were damaged."
    return [
        ("inputs damaged", f"{inputs['inputs']}, of {len(inputs['families'])} kinds"),
        (
            "refused in one line, repaired, or read in part and said so",
            f"{inputs['refused']}, {inputs['repaired']}, {inputs['told']}",
        ),
        (
            "tracebacks, wrong results and other ends",
            f"{inputs['tracebacks']}, {len(inputs['bad']) - inputs['tracebacks']}",
        ),
    ]


def walk_rows(walk: dict) -> list[tuple[str, str]]:
    "Of the file operations that were struck."
    creation, study = walk["creation"], walk["study"]
    struck = creation["struck"] + study["struck"]
    parts = (
        f"{struck}: {creation['struck']} of a study's creation ({creation['operations']} operations, each in"
        f" every way), {study['struck']} of a whole study ({study['operations']} operations, a sample)"
    )
    return [
        ("file operations struck (SIGKILL, ENOSPC, EIO, EROFS), then started again", parts),
        ("ended as if nothing had happened", f"{creation['good'] + study['good']} of {struck}"),
    ]


PARTS = {"kills": kill_rows, "ray": ray_rows, "inputs": input_rows, "walk": walk_rows}


def rows(found: dict) -> list[tuple[str, str]]:
    "The table's lines."
    return [line for name, part_rows in PARTS.items() if found.get(name) for line in part_rows(found[name])]


def kept(file: Path, found: dict) -> dict:
    """The file's figures with the parts that ran now laid over them; each of these says what it was measured
    on.
    """
    measured = {name: value for name, value in found.items() if name not in PARTS}
    before = json.loads(file.read_text()) if file.exists() else {}
    return before | {name: part | {"measured": measured} for name, part in found.items() if name in PARTS}


COUNTS = {  # option: default, help
    "runs": (100, "studies to kill"),
    "pairs": (5, "times that two commands work on one study"),
    "inputs": (10_000, "inputs to damage, at most"),
    "walk": (100, "file operations of a whole study to strike at"),
    "seed": (1, "of the moments and of the damage"),
    "workers": (os.cpu_count(), "at once"),
}


def parse_words(words: list[str] | None) -> argparse.Namespace:
    "What is asked for."
    parser = argparse.ArgumentParser(description="Break the package on purpose and count what it loses.")
    for name, (default, text) in COUNTS.items():
        shown = f"{text} (default {'all' if default == 10_000 else default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
    parser.add_argument("--no-ray", dest="ray", action="store_false", help="leave out the study on Ray")
    only = f"only these parts ({', '.join(PARTS)}); the file's other figures stay"
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=only)
    out = "where the counts go (default figures/faults.json)"
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "faults.json", help=out)
    return parser.parse_args(words)


def inject(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    "Run the parts that are asked for; the machine and what each part counted."
    found, parts, began = machine(), args.only or PARTS, time.perf_counter()
    common = (args.seed, args.workers, folder, console)
    if "kills" in parts and args.runs:
        found["kills"] = kill_runs(args.runs, args.pairs, *common)
    if "ray" in parts and args.ray and (done := ray_run(*common)):
        found["ray"] = done | {"bad": [] if done["good"] else [done]}
    if "inputs" in parts and args.inputs:
        found["inputs"] = damage_inputs(args.inputs, *common)
    if "walk" in parts and args.walk:
        found["walk"] = walks(args.walk, args.workers, folder, console)
    return found | {"seconds": round(time.perf_counter() - began)}


def print_rows(found: dict, seed: int, console: Console):
    "The table of all parts."
    where = f"{found['processors']} processors, commit {found['commit'][:12]}"
    table = Table(title=f"faults injected, seed {seed}, {where}", title_justify="left", show_header=False)
    for row in rows(found):
        table.add_row(*row)
    console.print(table)


def main(words: list[str] | None = None) -> int:
    "Inject faults, print and save the counts; the exit status is 1 where anything was bad."
    args, console = parse_words(words), Console()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    found = inject(args, folder, console)
    print_rows(found, args.seed, console)
    args.out.write_text(json.dumps(kept(args.out, found) if args.only else found, indent=1) + "\n")
    parts = [part for part in (*found.values(), found.get("kills", {}).get("two")) if isinstance(part, dict)]
    bad = sum(len(part.get("bad", [])) for part in parts)
    if bad:
        console.print(f"{bad} bad; their folders are kept in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
