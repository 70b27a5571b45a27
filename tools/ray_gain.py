"""What several workers of one thread gain over one, on Ray on this machine: `python tools/ray_gain.py FOLDER
[WORKERS]`. Minutes; no test runs it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

RUN = (sys.executable, "-m", "compassion_repro.cli", "run")
FOUR_ARMS = ("arms=[sft-help, sft-code, grpo-help, grpo-code]", "threads=1")


def timed_run(out: Path, workers: int, seeds: int, settings: tuple[str, ...]) -> dict:
    """One study on a Ray of so many processors; seconds from its first line to the end of its last stage, and
    of the whole command.
    """
    words = [word for setting in (*FOUR_ARMS, *settings) for word in ("--set", setting)]
    study = ["--preset", "smoke", "--seeds", str(seeds), "--out", str(out), "--no-report"]
    command = [*RUN, *study, "--engine", f"ray:{workers}", *words]
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here)
    for line in process.stdout:
        lines.append((time.perf_counter() - began, line))
    if process.wait():
        raise RuntimeError(f"the study in {out} ended with {process.returncode}: {lines[-1:]}")
    stages = [(seconds, line) for seconds, line in lines if line.startswith("[")]
    work = sum(json.loads(m.read_text())["seconds"] for m in out.glob("seed-*/[!.]*/manifest.json"))
    return {
        "workers": workers,
        "stages": len(stages),
        "seconds": round(stages[-1][0], 1),
        "to_first_stage": round(stages[0][0], 1),
        "command": round(time.perf_counter() - began, 1),
        "work": round(work, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def ray_gain(
    folder: str | Path,  # where the studies go; must not hold any
    workers: int = 4,  # processors of the Ray that is compared with one of a single processor
    seeds: int = 3,  # seeds of the four arms
    rounds: int = 2,  # pairs of runs; every second pair in the other order
    settings: tuple[str, ...] = (),  # `--set` values, laid over the preset smoke
) -> dict:  # the runs; gain: median seconds of one worker over those of several; a_worker: gain by worker
    "Run four arms and some seeds with one worker and with several, by turns, in one session."
    runs = []
    for number in range(rounds):
        order = (1, workers) if number % 2 == 0 else (workers, 1)
        for count in order:
            runs.append(timed_run(Path(folder) / f"round-{number}-workers-{count}", count, seeds, settings))
    one, many = (median(r["seconds"] for r in runs if r["workers"] == count) for count in (1, workers))
    return {
        "runs": runs,
        "workers": workers,
        "processors": os.cpu_count(),
        "seconds_one": one,
        "seconds_many": many,
        "gain": round(one / many, 2),
        "a_worker": round(one / many / workers, 2),
    }


if __name__ == "__main__":
    print(json.dumps(ray_gain(sys.argv[1], *map(int, sys.argv[2:3])), indent=1))
