"""Everything that the package reads, damaged in turn (`damage_cases.py`): each case must be refused in one
clear line, or mended so that the result is the sound one's. Nothing may end in a traceback, or in a wrong result.
"""

import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
from conftest import wait_for
from damage_cases import EVALUATE, Case
from kills import contents, differences, kill, start

GRACE_SECONDS = 240  # seconds of processor time that a command may take; the smallest study takes 30


# ---- ways to damage a file


def _cut(data, rng):
    return data[: max(1, int(len(data) * rng.uniform(0.1, 0.9)))]


def _flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _zeros(data, rng):
    size = max(8, len(data) // 20)
    at = rng.randrange(max(1, len(data) - size))
    return data[:at] + b"\0" * size + data[at + size :]


def _garbage(data, rng):
    return rng.randbytes(max(64, min(len(data), 20_000)))


def _utf16(data, rng):
    return data.decode().encode("utf-16")


def _latin(data, rng):
    return b"\xe9\xff\xfe" + data


def _digit(data, rng):
    "One digit of a number changed: still the same format, no longer the same content."
    places = [at for at, byte in enumerate(data) if 49 <= byte <= 57 and data[at - 1 : at] in (b".", b" ")]
    at = rng.choice(places)
    digit = int(data[at : at + 1])
    return data[:at] + (b"6" if digit == 5 else b"%d" % (10 - digit)) + data[at + 1 :]


BYTES = {
    "cut": _cut,
    "flip": _flip,
    "zeros": _zeros,
    "garbage": _garbage,
    "utf-16": _utf16,
    "latin": _latin,
    "digit": _digit,
    "empty": lambda data, rng: b"",
}


OTHER = {  # text of another content, by suffix
    ".yaml": "just: words\n",
    ".csv": "a,b\n1,2\n",
    ".safetensors": "{}",
    ".jsonl": '{"who": 1}\n' * 3,
}


def _replace(file: Path):
    "Put something else in place of a file: sound, in its format, with another content."
    if file.suffix == ".parquet":
        pd.DataFrame({"who": ["a"], "what": [1]}).to_parquet(file)
    elif file.suffix == ".sqlite":
        file.unlink()
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute("CREATE TABLE replies (one INTEGER)")
    else:
        file.write_text(OTHER.get(file.suffix, '{"who": [1, 2]}'))


def spoil(file: Path, how: str, rng: random.Random):
    "Damage one file."
    if how == "gone":
        return file.unlink()
    if how == "folder":
        file.unlink()
        return file.mkdir()
    if how == "huge":  # a gigabyte of nothing after it, which takes no space on the disk
        os.truncate(file, file.stat().st_size + 2**30)
        return
    if how == "other":
        return _replace(file)
    data = file.read_bytes()
    for _ in range(50):
        if (new := BYTES[how](data, rng)) != data:
            return file.write_bytes(new)
    raise ValueError(f"{file} cannot be damaged by {how}")


# ---- sound folders


def _judge_provider():
    "A judge that would cost money, in this process: its grade depends on the prompt."
    import hashlib

    from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi

    @modelapi(name="purse")
    class Purse(ModelAPI):
        "Grades by the prompt's own digest."

        async def generate(self, input, tools, tool_choice, config):
            "One grade, with the usage that is paid for."
            grade = "CI"[hashlib.sha256(input[-1].text.encode()).digest()[0] % 2]
            output = ModelOutput.from_content(self.model_name, f"Weighed.\n\nGRADE: {grade}")
            output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return output


def make_half(folder: Path, study: Path):
    "The sound study, cut off in an arm right after a checkpoint."
    folder.mkdir(parents=True)
    shutil.copytree(study, folder / "study")
    (folder / "contents.json").write_text(json.dumps(contents(study)))
    shutil.rmtree(folder / "study" / "seed-1" / "sft-help")
    process = start(folder / "study", "compute.checkpoint_minutes=0.0000001")
    wait_for(lambda: list(folder.glob("study/seed-1/.sft-help.checkpoints/checkpoint-*/seal.json")), process)
    kill(process)


def make_inputs(folder: Path):
    "What a user may bring: rows in three formats, benchmark folders, a model, a preset."
    from compassion_repro.data import world

    folder.mkdir(parents=True)
    rows = [
        {"instruction": f"Question {n}?", "response": f"Answer {n}, and what follows from it."}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    shutil.copytree(world.write_benchmark("anima", folder / "world", {"en": 3}), folder / "mine")
    moru = world.write_benchmark("moru", folder / "world", {"en": 3})
    for name, place in (("moru", moru), ("moru_dims", moru.parent / "moru_dims")):
        shutil.copytree(place, folder / name)
    shutil.copytree(world.assets() / "base", folder / "model")
    (folder / "preset.yaml").write_text("extends: smoke\nsft: {steps: 2, rows: 60}\nnothing: 1\n")


def make_evaluation(folder: Path):
    "An evaluation under a judge that costs money, and a sheet that people have filled in."
    folder.mkdir(parents=True)
    for words in (
        ("eval", "world:base", *EVALUATE),
        ("annotate", "{}/evaluation", "--sample", "6", "--out", "{}/sheet.csv"),
    ):
        status, out, err = call(words, folder)
        if status:
            raise RuntimeError(f"{words}: {err}")
    rows = _sheet(folder / "sheet.csv")
    with (folder / "sheet.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "grade": str(n % 2)} for n, row in enumerate(rows))
    (folder / "prices.yaml").write_text("purse/other: {input: 1, output: 2}\n")


# ---- running one


@contextlib.contextmanager
def captured(texts: list[str]):
    "Whatever reaches the two outputs, from whatever library, is added to the list afterwards."
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            with (
                open(1, "w", closefd=False) as stdout,
                open(2, "w", closefd=False) as stderr,
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
            ):
                yield
        finally:
            for number, before in zip((1, 2), saved):
                os.dup2(before, number)
                os.close(before)
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def call(words: tuple[str, ...], folder: Path) -> tuple[int, str, str]:
    "Run a command line in this process: its exit status and what it printed on both outputs."
    from compassion_repro import cli

    filled, texts = [word.replace("{}", str(folder)) if "{}/" in word else word for word in words], []
    with captured(texts):
        try:
            status = cli.main(filled)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    return status, *texts


class Hung(BaseException):
    "A command that does not come to an end."


@contextlib.contextmanager
def patience(seconds: float):
    """An end to what would go on for ever: after so much processor time, which other programs cannot use up,
    or ten times as much by the clock.
    """

    def give_up(number, frame):
        raise Hung(f"no end after {seconds:.0f} s of processor time or {10 * seconds:.0f} s in all")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds),
    )
    before = [signal.signal(number, give_up) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for (number, _, _), handler in zip(timers, before):
            signal.signal(number, handler)


class Accepted(Exception):
    "The checks before the first stage let an input through."


@contextlib.contextmanager
def nothing_runs():
    "Stages that end at once, to see what the checks before them let through."
    from compassion_repro.pipeline import stages

    before = dict(stages.RUN)

    def stop(work):
        raise Accepted

    stages.RUN.update(dict.fromkeys(before, stop))
    try:
        yield
    finally:
        stages.RUN.update(before)


def _tables(folder: Path) -> dict[str, str]:
    "Grades and scores of an evaluation, in an order that is always the same."
    order, found = ["judge", "model", "benchmark", "question_id", "epoch", "dimension"], {}
    for name in ("grades", "scores"):
        table = pd.read_parquet(folder / f"{name}.parquet").sort_values(order, kind="stable")
        found[name] = table.to_json(orient="records", double_precision=15)
    return found


def _original_rows() -> set[tuple[str, str]]:
    "The rows of the sound data files."
    return {(f"Question {n}?", f"Answer {n}, and what follows from it.") for n in range(40)}


def wrong_study(case: Case, folder: Path, sound: Path, out: str) -> str:
    "How a study, or its printed claims, differ from the sound one's."
    if case.words[0] == "claims":
        return "" if out == (sound / "claims.txt").read_text() else "other claims than the sound study's"
    different = differences(folder / "study", json.loads((sound / "contents.json").read_text()))
    return f"other results: {', '.join(different[:4])}" if different else ""


def wrong_evaluation(case: Case, folder: Path, sound: Path, out: str) -> str:
    "Which tables of an evaluation differ from the sound one's."
    mine, reference = _tables(folder / "evaluation"), _tables(sound / "evaluation")
    return ", ".join(f"other {name}" for name in mine if mine[name] != reference[name])


GRADED = ("model", "question_id", "epoch", "dimension", "variables")  # what a line of a sheet is about


def _sheet(file: Path) -> list[dict[str, str]]:
    "The lines of a sheet."
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def wrong_sheet(case: Case, folder: Path, sound: Path, out: str) -> str:
    "Grades that were read and that nobody gave in the sound sheet."
    about = {row["id"]: tuple(row[name] for name in GRADED) for row in _sheet(sound / "sheet.key.csv")}
    given = {about[row["id"]]: float(row["grade"]) for row in _sheet(sound / "sheet.csv")}
    read = pd.read_parquet(next((folder / "evaluation").glob("judges/human/grades.parquet")))
    graded = zip(read[list(GRADED)].astype(str).itertuples(index=False, name=None), read["grade"])
    bad = sum(given.get(about) != grade for about, grade in graded)
    return f"{bad} grades that nobody gave" if bad else ""


WRONG = {  # by a case's `check`: what is wrong with a command that succeeded; empty where it is the sound one's
    "refused": lambda case, folder, sound, out: "it was not refused",
    "study": wrong_study,
    "evaluation": wrong_evaluation,
    "sheet": wrong_sheet,
}


def accepted_wrongly(case: Case, folder: Path, out: str) -> str:
    """What is wrong with letting a damaged data file through; empty where only rows of the sound file are
    used, and what was left out is said.
    """
    from compassion_repro.data import rows as data

    file = folder / case.target
    loaded = data.load(str(file), "messages").rows
    rows = [tuple(turn["content"] for turn in row["messages"]) for row in loaded]
    if strange := set(rows) - _original_rows():
        return f"{len(strange)} rows that the sound file does not hold"
    if len(rows) < 40 and "dropped" not in out:
        return f"{40 - len(rows)} rows were lost and nothing said"
    return ""


def try_case(case: Case, bases: Path, seed: int, scratch: Path) -> dict:
    "One case: what came of it (refused, repaired, told) or, in `bad`, what is wrong with that."
    began, rng, sound = time.perf_counter(), random.Random(f"{seed}-{case.name}"), bases / case.base
    folder = Path(shutil.copytree(sound, Path(tempfile.mkdtemp(dir=scratch)) / "copy", symlinks=True))
    for part in case.first:
        shutil.rmtree(folder / part)
    if case.how.startswith("grade "):
        _other_grade(folder / case.target, int(case.how.split()[1]))
    elif case.how != "wrong":
        spoil(rng.choice(sorted(p for p in folder.glob(case.target) if p.is_file())), case.how, rng)
    try:
        with patience(GRACE_SECONDS), nothing_runs() if case.check == "rows" else contextlib.nullcontext():
            status, out, err = call(case.words, folder)
        outcome, bad = _verdict(case, folder, sound, status, out, err)
    except Hung as error:
        outcome, bad, err = "hung", str(error), ""
    shutil.rmtree(folder.parent, ignore_errors=True)
    return {
        "case": case.name,
        "family": case.family,
        "outcome": outcome,
        "bad": bad,
        "said": err.strip()[-400:],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _other_grade(file: Path, which: int):
    "Change the grade within a kept reply: the file stays a sound database."
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as replies:
        key, output = replies.execute("SELECT key, output FROM replies ORDER BY key").fetchall()[which]
        old, new = ("I", "C") if "GRADE: I" in output else ("C", "I")
        changed = output.replace(f"GRADE: {old}", f"GRADE: {new}")
        replies.execute("UPDATE replies SET output = ? WHERE key = ?", (changed, key))


def _verdict(case: Case, folder: Path, sound: Path, status: int, out: str, err: str) -> tuple[str, str]:
    "What came of a case, and what is wrong with that."
    if "Traceback" in out + err:
        return "traceback", f"a traceback: {err.strip().splitlines()[-1][:200]}"
    if status == 1 and "unexpected Accepted" in err:
        return "told", accepted_wrongly(case, folder, out)
    if status == 2 and case.mended:
        return "refused", f"it could have been made again: {err.strip()[:300]}"
    if status == 2:
        if not (err.startswith("compassion-repro: ") and err.count("\n") == 1):
            return "refused", f"not one line on stderr: {err[:300]!r}"
        return "refused", "" if case.said in err else f"the line does not name {case.said}: {err.strip()}"
    if status:
        return "failed", f"exit status {status}: {err.strip()[-300:]}"
    try:
        return "repaired", WRONG[case.check](case, folder, sound, out)
    except Exception as error:
        return "repaired", f"the result cannot be read: {type(error).__name__}: {str(error)[:200]}"


def make_study(folder: Path, study: Path):
    "The sound study and what is to be expected of it."
    folder.mkdir(parents=True)
    shutil.copytree(study, folder / "study")
    (folder / "contents.json").write_text(json.dumps(contents(folder / "study")))
    (folder / "claims.txt").write_text(call(("claims", "{}/study"), folder)[1])


def prepare_worker():
    """What every process needs before its first case: the judge, and an end to its memory before the
    machine's.
    """
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
    os.environ["OMP_NUM_THREADS"] = "1"
    _judge_provider()


OUTCOMES = ("refused", "repaired", "told")  # told: read in part, and said so


def summary(results: list[dict]) -> dict:
    "The counts of all cases."
    by_family = Counter((result["family"], result["outcome"]) for result in results)
    good = Counter(result["outcome"] for result in results if not result["bad"])
    families = dict.fromkeys(result["family"] for result in results)
    return {
        "inputs": len(results),
        "good": good.total(),
        **{outcome: good[outcome] for outcome in OUTCOMES},
        "tracebacks": sum(result["outcome"] == "traceback" for result in results),
        "families": {name: {outcome: by_family[name, outcome] for outcome in OUTCOMES} for name in families},
        "bad": [result for result in results if result["bad"]],
    }
