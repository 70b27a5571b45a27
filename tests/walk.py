"""Walk through every file operation of a command: kill it there, or let the operation fail once, and start the
command again.

The operations are seen by Python's audit hooks, so the walk needs nothing from the package and finds
operations that are
added later. A walk forks one process for each attempt; it belongs in a process that has run no threads yet:
`python tests/walk.py creation` walks through the making of a study, `python tests/walk.py study` through a
whole one.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import CRASH_SIZE, settings  # noqa: E402

WAYS = ("kill", "ENOSPC", "EIO", "EROFS")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SLOW = ("compassion_repro", "torch", "transformers", "datasets", "peft", "pandas", "scipy", "statsmodels")
SMALLEST = ("arms=[]", "benchmarks={anima: {task: anima, data: 'world:anima', epochs: 1, size: {en: 2}}}")


class Operations:
    "Counts what a process changes in a folder, and strikes at one operation."

    def __init__(self, folder: Path, number: int | None = None, how: str = "kill"):
        self.folder, self.number, self.how, self.seen = str(folder), number, how, []

    def watch(self):
        """Count from now on; an audit hook cannot be taken away, so this is for a process that ends
        afterwards.
        """
        real_open, real_fsync = io.open, os.fsync

        def opened(file, mode="r", *rest, **named):
            handle = real_open(file, mode, *rest, **named)
            if set(mode) & set("wax+"):
                self.count("written", file)
            return handle

        def flushed(handle):
            self.count(
                "flush",
                os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}"),
            )
            return real_fsync(handle)

        io.open, os.fsync = opened, flushed
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple):
        "One event of the interpreter."
        if event == "open" and (args[2] or 0) & WRITES:
            self.count("open", args[0])
        elif event in CHANGES:
            self.count(event, args[0])

    def count(self, what: str, path):
        "One operation; those outside the folder and those of other threads do not count."
        if threading.current_thread() is not threading.main_thread() or not isinstance(
            path, (str, bytes, os.PathLike)
        ):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not (path + os.sep).startswith(self.folder + os.sep):
            return
        self.seen.append(f"{what} {path[len(self.folder) :] or '/'}")
        if len(self.seen) - 1 == self.number:
            self.strike(path)

    def strike(self, path: str):
        "End the process, or let the operation fail."
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.how)
        raise OSError(code, os.strerror(code), path)


def attempt(
    act: Callable[[Path], int],  # what is done to the folder; returns an exit status
    folder: Path,
    number: int | None = None,  # operation to strike at
    how: str = "kill",  # one of WAYS
) -> tuple[int, str, dict]:  # exit status (negative: the signal), what was printed, operations and modules
    "Do it once, in a process of its own."
    operations, notes = Operations(folder, number, how), folder.parent / f"{folder.name}.operations"
    log = folder.parent / f"{folder.name}.log"
    if (child := os.fork()) == 0:
        status = 70
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            operations.watch()
            status = act(folder)
            sys.stdout.flush()
            sys.stderr.flush()
            notes.write_text(json.dumps({"operations": operations.seen, "modules": sorted(sys.modules)}))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text(errors="replace"), json.loads(notes.read_text()) if notes.exists() else {}


def fault(
    act: Callable[[Path], int],
    state: Callable[[Path], object],  # what is compared
    wanted: tuple[int, object],  # exit status and state of an undisturbed run
    folder: Path,  # to be made
    number: int,
    how: str,
) -> str:  # in words; empty where all is well
    "Strike at one operation, start again, and say what is wrong with what came of it."
    status, said, _ = attempt(act, folder, number, how)
    refused = [line for line in said.splitlines() if line.startswith("compassion-repro: ")]
    if how == "kill" and status != -signal.SIGKILL:
        return f"was not reached: status {status}"
    if (
        how != "kill"
        and not (status == wanted[0] or status == 2 and len(refused) == 1)
        or "Traceback" in said
    ):
        return f"status {status}: {said.strip()[-300:]}"
    status, said, _ = attempt(act, folder)
    if status != wanted[0]:
        return f"started again: status {status}: {said.strip()[-300:]}"
    return "" if state(folder) == wanted[1] else "started again, it ends with something else"


def fault_at(act, state, wanted: tuple[int, object], folder: Path, point: tuple[int, str]) -> str:
    "One attempt in a folder that goes again where all is well."
    place = folder / f"{point[1]}-{point[0]}"
    wrong = fault(act, state, wanted, place, *point)
    if not wrong:
        shutil.rmtree(place, ignore_errors=True)
    return wrong


def chosen(operations: int, ways: tuple[str, ...], sample: bool, most: int | None) -> list[tuple[int, str]]:
    "Where to strike, and how: the numbers of operations with one of the ways."
    errors = [how for how in ways if how != "kill"]
    if most is None or most >= operations * len(ways):
        return [
            (number, how)
            for number in range(operations)
            for how in ways
            if not sample or how in ("kill", errors[number % len(errors)])
        ]
    return [
        (min(operations - 1, int((n + 0.5) * operations / most)), ways[n % len(ways)]) for n in range(most)
    ]


def walk(
    act: Callable[[Path], int],
    state: Callable[[Path], object],
    folder: Path,  # for the attempts
    ways: tuple[str, ...] = WAYS,
    workers: int = 1,
    sample: bool = False,  # kill at every operation, but let each fail in one way only
    most: int | None = None,  # at so many operations only, evenly spread over the run, each in one way
    tell: Callable[[int, int], None] = lambda done, of: None,  # called after each attempt
) -> dict:  # counts, and `bad`: what went wrong, by operation and way
    "Strike at every operation in every way."
    status, said, seen = attempt(act, folder / "whole")
    if status not in (0, 2) or not seen:
        raise RuntimeError(f"the undisturbed run ended with {status}: {said[-500:]}")
    wanted, operations = (status, state(folder / "whole")), seen["operations"]
    for module in seen["modules"]:  # once here, so that each attempt need not
        if module.partition(".")[0] in SLOW:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    points = chosen(len(operations), ways, sample, most)

    found = []
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:  # a fork of a thread is another thing
        for wrong in pool.map(partial(fault_at, act, state, wanted, folder), points):
            found.append(wrong)
            tell(len(found), len(points))
    bad = [
        {"operation": operations[n], "number": n, "way": how, "wrong": wrong}
        for (n, how), wrong in zip(points, found)
        if wrong
    ]
    return {"operations": len(operations), "struck": len(points), "good": len(points) - len(bad), "bad": bad}


def create_study(folder: Path) -> int:
    "What the command `run` does before its first stage."
    from compassion_repro.core.errors import InputError
    from compassion_repro.presets import load_preset
    from compassion_repro.store.checks import take_stock
    from compassion_repro.store.folder import Study

    preset = load_preset("smoke", CRASH_SIZE)
    try:
        with Study(folder).lock("run"):
            take_stock(Study.create(folder, preset), preset, [])
    except InputError as error:
        print(f"compassion-repro: {error}")
        return 2
    return 0


def run_smallest(folder: Path) -> int:
    "The whole command `run`, of the smallest study."
    from compassion_repro import cli

    return cli.main(
        ["run", "--preset", "smoke", "--out", str(folder), "--no-report", "--no-reuse", *settings(*SMALLEST)]
    )


def begun(folder: Path) -> dict[str, str]:
    "What the making of a study leaves: its files with their content, of the record the files that fit it."
    from kills import untimed

    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    recorded = json.loads(files["record.json"])["files"]
    fits = {
        name: entries[0]["sha256"] == hashlib.sha256(files[name]).hexdigest()
        for name, entries in recorded.items()
    }
    return {name: untimed(content).decode() for name, content in files.items()} | {"record.json": fits}


def walk_creation(folder: Path, workers: int = 1, **options) -> dict:
    "Through the making of a study."
    return walk(create_study, begun, folder, workers=workers, **options)


def walk_study(folder: Path, workers: int = 1, **options) -> dict:
    "Through a whole study."
    from kills import contents

    return walk(run_smallest, contents, folder, workers=workers, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk through every file operation of a command.")
    parser.add_argument("which", choices=["creation", "study"], help="the making of a study, or a whole one")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="attempts at once (default 1)")
    parser.add_argument("--sample", action="store_true", help="let each operation fail in one way only")
    parser.add_argument("--most", type=int, metavar="N", help="strike N times only, spread over the run")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="walk-"))
    walks = {"creation": walk_creation, "study": walk_study}
    found = walks[args.which](folder, args.workers, sample=args.sample, most=args.most)
    print(json.dumps(found, indent=1))
    if not found["bad"]:
        shutil.rmtree(folder)
    return int(bool(found["bad"]))


if __name__ == "__main__":
    sys.exit(main())
