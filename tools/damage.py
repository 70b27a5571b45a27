"""Everything that the package reads, damaged in turn: each case must be refused in one clear line, or mended so
that the result is the sound one's. Nothing may end in a traceback, or in a wrong result.

A case is a copy of a sound folder, a damage, and a command line that is run in this process. What cannot be
told is not asked: a flipped bit that leaves another valid letter in a user's own text is that user's text. In
what the package itself wrote, every bit counts.
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
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from conftest import settings, wait_for
from kills import contents, kill, start

GRACE_SECONDS = 240  # seconds of processor time that a command may take; the smallest study takes 30
JUDGED = ["--judge", "purse/fine", "--yes"]


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
    return (
        data[:at] + b"%d" % (10 - int(data[at : at + 1]) or 1) + data[at + 1 :]
        if int(data[at : at + 1]) != 5
        else data[:at] + b"6" + data[at + 1 :]
    )


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


def spoil(file: Path, how: str, rng: random.Random):
    "Damage one file."
    if how == "gone":
        return file.unlink()
    if how == "folder":
        file.unlink()
        return file.mkdir()
    if how == "huge":  # a gigabyte of nothing behind it, which takes no room on the disk
        os.truncate(file, file.stat().st_size + 2**30)
        return
    if how == "other":  # sound, and something else
        if file.suffix == ".parquet":
            return pd.DataFrame({"who": ["a"], "what": [1]}).to_parquet(file)
        if file.suffix == ".sqlite":
            file.unlink()
            with contextlib.closing(sqlite3.connect(file)) as other:
                other.execute("CREATE TABLE replies (one INTEGER)")
            return
        return file.write_text(
            {
                ".yaml": "just: words\n",
                ".csv": "a,b\n1,2\n",
                ".safetensors": "{}",
                ".jsonl": '{"who": 1}\n' * 3,
            }.get(file.suffix, '{"who": [1, 2]}')
        )
    data = file.read_bytes()
    for _ in range(50):
        if (new := BYTES[how](data, rng)) != data:
            return file.write_bytes(new)
    raise ValueError(f"{file} cannot be damaged by {how}")


# ---- cases


@dataclass(frozen=True)
class Case:
    "One damage to one input."

    family: str  # what kind of input
    target: str  # the file, within the sound folder; may be a pattern
    how: str  # the damage
    words: tuple[str, ...]  # command line; {} is the copy
    base: str = "study"  # which sound folder is copied
    check: str = "study"  # what must hold where the command succeeds
    said: str = ""  # what a refusal must name
    first: tuple[str, ...] = ()  # parts of the copy that are taken away, so that the command has work to do
    mended: bool = False  # all of it can be made again, so a refusal is no answer

    @property
    def name(self) -> str:
        return f"{self.family}: {self.target} {self.how} ({' '.join(self.words[:1])})"


RUN = ("run", "--preset", "smoke", "--out", "{}/study", "--no-report", *settings())
FRESH = ("run", "--preset", "smoke", "--out", "{}/new", "--no-report", *settings())


def cross(family: str, targets: str, hows: str, words: tuple[str, ...], **more) -> list[Case]:
    "Every target with every damage."
    return [Case(family, target, how, words, **more) for target in targets.split() for how in hows.split()]


def artifact_cases() -> list[Case]:
    "What stages left in the store: all of it can be made again."
    seed = "study/seed-1"
    return [
        replace(case, mended=True)
        for case in (
            *cross(
                "weights",
                f"{seed}/base/model.safetensors {seed}/mid/model.safetensors"
                f" {seed}/sft-help/model.safetensors",
                "cut empty flip zeros huge gone",
                RUN,
            ),
            *cross(
                "model files",
                f"{seed}/mid/config.json {seed}/mid/tokenizer.json {seed}/sft-code/generation_config.json",
                "cut flip other",
                RUN,
            ),
            *cross(
                "training rows",
                f"{seed}/sft-code/rows.jsonl {seed}/mid/held_out.jsonl",
                "cut flip utf-16 gone",
                RUN,
            ),
            *cross(
                "answers", f"{seed}/answers-mid/answers.parquet", "cut flip zeros empty other huge gone", RUN
            ),
            *cross(
                "answers, used by the next stage",
                f"{seed}/answers-mid/answers.parquet",
                "flip zeros other",
                RUN,
                first=(f"{seed}/eval-mid",),
            ),
            *cross(
                "weights, used by the next stage",
                f"{seed}/mid/model.safetensors",
                "flip zeros",
                RUN,
                first=(f"{seed}/answers-mid", f"{seed}/probe-mid"),
            ),
            *cross(
                "grades and scores",
                f"{seed}/eval-mid/grades.parquet {seed}/eval-mid/scores.parquet",
                "cut flip empty other",
                RUN,
            ),
            *cross(
                "margins",
                f"{seed}/probe-mid/margin.parquet {seed}/probe-mid/kl.parquet",
                "cut flip other",
                RUN,
            ),
            *cross(
                "manifests",
                f"{seed}/mid/manifest.json {seed}/sft-code/manifest.json {seed}/eval-mid/manifest.json",
                "cut empty flip digit utf-16 other garbage gone",
                RUN,
            ),
            *cross(
                "benchmark copies",
                "study/benchmarks/*/questions/train.jsonl study/benchmarks/*/dimensions/train.jsonl"
                " study/benchmarks/moru-*/train.jsonl",
                "cut flip empty other",
                RUN,
                first=(f"{seed}/answers-mid", f"{seed}/eval-mid"),
            ),
            *cross(
                "benchmark caches",
                "study/benchmarks/arrow/*/*/*/*/*.arrow",
                "cut flip empty",
                RUN,
                first=(f"{seed}/answers-mid", f"{seed}/eval-mid"),
            ),
        )
    ]


def checkpoint_cases() -> list[Case]:
    """What a stage that was cut off left for the next run to carry on from; it may be passed over, never
    believed.
    """
    from compassion_repro.study import Compute

    if "checkpoint_minutes" not in Compute.model_fields:
        return []
    kept = "study/seed-1/.sft-help.checkpoints"
    return cross(
        "checkpoints",
        f"{kept}/checkpoint-*/* {kept}/*",
        "cut flip zeros empty garbage gone",
        RUN,
        base="half",
        mended=True,
    )


def table_cases() -> list[Case]:
    "The study's own tables and its configuration, under the commands that read them."
    report, claims = ("report", "{}/study"), ("claims", "{}/study")
    names = "study/answers.parquet study/grades.parquet study/scores.parquet"
    return [
        *cross(
            "tables", f"{names} study/margin.parquet study/kl.parquet", "cut flip other", RUN, mended=True
        ),
        *cross("tables", names, "cut flip zeros empty other", report, said=".parquet"),
        *cross(
            "claims", "study/claims.json", "cut digit empty other utf-16 garbage gone", claims, said="claims"
        ),
        *cross("claims", "study/claims.json", "cut digit", RUN, mended=True),
        *cross(
            "study.yaml",
            "study/study.yaml",
            "cut empty flip digit utf-16 other garbage gone",
            RUN,
            said="study",
        ),
        *cross("study.yaml", "study/study.yaml", "cut digit other garbage", report, said="study.yaml"),
    ]


def data_cases() -> list[Case]:
    "Rows, benchmarks and models that a user brings."

    def fresh(setting):
        return (*FRESH, "--set", setting)

    rows = "cut empty utf-16 garbage other folder gone"
    sft = "arms=[sft-help, sft-code]"
    anima, moru = fresh("benchmarks.anima.data={}/mine"), fresh("benchmarks.moru.data={}/moru")
    return [
        *cross(
            "data files",
            "rows.jsonl",
            f"{rows} latin huge zeros",
            (*fresh("data.sft-help={}/rows.jsonl"), "--set", sft),
            base="inputs",
            check="rows",
            said="rows.jsonl",
        ),
        *cross(
            "data files",
            "rows.json",
            rows,
            (*fresh("data.sft-help={}/rows.json"), "--set", sft),
            base="inputs",
            check="rows",
            said="rows.json",
        ),
        *cross(
            "data files",
            "rows.parquet",
            "cut empty garbage other folder gone huge",
            (*fresh("data.sft-help={}/rows.parquet"), "--set", sft),
            base="inputs",
            check="rows",
            said="rows.parquet",
        ),
        *cross(
            "benchmark folders",
            "mine/questions/train.jsonl mine/dimensions/train.jsonl",
            "cut empty utf-16 garbage other gone latin",
            anima,
            base="inputs",
            check="refused",
            said="mine",
        ),
        *cross(
            "benchmark folders",
            "mine/README.md",
            "cut empty utf-16 gone other garbage",
            anima,
            base="inputs",
            check="refused",
            said="mine",
        ),
        *cross(
            "benchmark folders",
            "moru/train.jsonl moru_dims/train.jsonl",
            "cut empty other gone latin",
            moru,
            base="inputs",
            check="refused",
            said="moru",
        ),
        *cross(
            "model folders",
            "model/model.safetensors",
            "cut empty garbage gone other huge",
            fresh("models.base={}/model"),
            base="inputs",
            check="refused",
            said="model",
        ),
        *cross(
            "model folders",
            "model/config.json model/tokenizer.json",
            "cut empty garbage other gone",
            fresh("models.base={}/model"),
            base="inputs",
            check="refused",
            said="model",
        ),
    ]


CONFIGURATION = (
    "sft.steps=many",
    "sft.steps=-1",
    "sft.steps=1e400",
    "sft.learning_rate=.nan",
    "sft.learning_rate=.inf",
    "sft=5",
    "sft=[1,2]",
    "sft",
    "=1",
    "models.base=",
    "arms=[sft-help, sft-help]",
    "arms=sft-hlep",
    "arms=[mid]",
    "generation.template=../../etc/passwd",
    "judge=",
    "judge=[1]",
    "benchmarks.anima.size={en: -3}",
    "benchmarks.anima.epochs=0",
    "lora.rank=99999999999999999999",
    "statistics.resamples=true",
    "threads=0",
    "data.sft-help=\x00",
    "data.documents=/proc/self/mem",
    "midtrain.rows=1" + "0" * 400,
    "models.base=" + "a/" * 3000,
    "name=../../outside",
    "benchmarks={../../outside: {task: anima, data: 'world:anima'}}",
)


def configuration_cases() -> list[Case]:
    "Settings on the command line, preset files, price tables."
    return [
        *(
            Case(
                "--set values",
                setting if len(setting) < 60 else f"{setting[:40]}...",
                "wrong",
                (*FRESH, "--set", setting),
                base="inputs",
                check="refused",
                said="" if setting.startswith(("data.", "models.")) else setting.split("=")[0].split(".")[0],
            )
            for setting in CONFIGURATION
        ),
        *cross(
            "preset files",
            "preset.yaml",
            "cut utf-16 other garbage empty gone folder",
            ("run", "--preset", "{}/preset.yaml", "--out", "{}/new", "--no-report"),
            base="inputs",
            check="refused",
            said="preset",
        ),
        *cross(
            "price tables",
            "prices.yaml",
            "utf-16 other garbage gone folder",
            ("judge", "{}/evaluation", "--judge", "purse/other", "--prices", "{}/prices.yaml"),
            base="evaluation",
            check="refused",
            said="prices.yaml",
        ),
    ]


def evaluation_cases() -> list[Case]:
    "An evaluation's files, the replies that were paid for, and the sheets that people filled in."
    again, sheet = (
        ("judge", "{}/evaluation", *JUDGED),
        (
            "annotate",
            "{}/evaluation",
            "--read",
            "{}/sheet.csv",
        ),
    )
    evaluate = ("eval", "world:base", *EVALUATE)
    fresh = (*again, "--again")
    return [
        *cross(
            "evaluation setup",
            "evaluation/eval.yaml",
            "cut empty utf-16 other garbage digit",
            again,
            base="evaluation",
            check="evaluation",
            said="eval",
        ),
        *cross(
            "evaluation answers",
            "evaluation/answers/*/*.parquet",
            "cut empty flip zeros other gone",
            evaluate,
            base="evaluation",
            check="evaluation",
        ),
        *cross(
            "evaluation tables",
            "evaluation/answers.parquet evaluation/grades.parquet evaluation/scores.parquet",
            "cut flip other gone",
            again,
            base="evaluation",
            check="evaluation",
        ),
        *cross(
            "judges' passes",
            "evaluation/judges/*/pass.json evaluation/judges/*/scores.parquet"
            " evaluation/judges/*/grades.parquet",
            "cut empty flip other gone",
            again,
            base="evaluation",
            check="evaluation",
        ),
        *cross(
            "replies",
            "evaluation/judge-replies.sqlite",
            "cut empty flip zeros garbage other gone huge folder",
            fresh,
            base="evaluation",
            check="evaluation",
        ),
        *(
            Case(
                "replies",
                "evaluation/judge-replies.sqlite",
                f"grade {n}",
                fresh,
                base="evaluation",
                check="evaluation",
            )
            for n in (1, 2, 3)
        ),
        *cross(
            "human grades",
            "sheet.csv sheet.key.csv",
            "cut empty utf-16 latin garbage other gone folder zeros",
            sheet,
            base="evaluation",
            check="sheet",
            said="sheet",
        ),
    ]


EVALUATE = (
    "--bench",
    "tiny-anima,tiny-moru",
    "--out",
    "{}/evaluation",
    "--limit",
    "2",
    "--epochs",
    "2",
    "--max-tokens",
    "8",
    *JUDGED,
)


def all_cases() -> list[Case]:
    "Every case, in an order that is always the same."
    return [
        *artifact_cases(),
        *checkpoint_cases(),
        *table_cases(),
        *data_cases(),
        *configuration_cases(),
        *evaluation_cases(),
    ]


# ---- sound folders


def _judge_provider():
    "A judge that would cost money, in this process: its grade hangs on the prompt."
    import hashlib

    from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi

    @modelapi(name="purse")
    class Purse(ModelAPI):
        "Grades by the prompt's own digest."

        async def generate(self, input, tools, tool_choice, config):
            output = ModelOutput.from_content(
                self.model_name,
                f"Weighed.\n\nGRADE: {'CI'[hashlib.sha256(input[-1].text.encode()).digest()[0] % 2]}",
            )
            output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return output


def make_half(folder: Path, study: Path):
    "The sound study, cut off in an arm right after a checkpoint."
    if not checkpoint_cases():
        return
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
    with (folder / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "sheet.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "grade": str(n % 2)} for n, row in enumerate(rows))
    (folder / "prices.yaml").write_text("purse/other: {input: 1, output: 2}\n")


# ---- running one


def call(words: tuple[str, ...], folder: Path) -> tuple[int, str, str]:
    """Run a command line in this process, with everything that reaches the two outputs, from whatever
    library, caught.
    """
    from compassion_repro import cli

    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            with (
                open(1, "w", closefd=False) as stdout,
                open(2, "w", closefd=False) as stderr,
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
            ):
                try:
                    status = cli.main(
                        [word.replace("{}", str(folder)) if "{}/" in word else word for word in words]
                    )
                except SystemExit as error:
                    status = error.code if isinstance(error.code, int) else 1
        finally:
            for number, before in zip((1, 2), saved):
                os.dup2(before, number)
                os.close(before)
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
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
    return {
        name: (
            pd.read_parquet(folder / f"{name}.parquet")
            .sort_values(["judge", "model", "benchmark", "question_id", "epoch", "dimension"], kind="stable")
            .to_json(orient="records", double_precision=15)
        )
        for name in ("grades", "scores")
    }


def _original_rows() -> set[tuple[str, str]]:
    return {(f"Question {n}?", f"Answer {n}, and what follows from it.") for n in range(40)}


def wrong(case: Case, folder: Path, sound: Path, out: str) -> str:
    "What is wrong with the result of a command that succeeded; empty where it is the sound one's."
    if case.check == "refused":
        return "it was not refused"
    if case.check == "study":
        if case.words[0] == "claims":
            return "" if out == (sound / "claims.txt").read_text() else "other claims than the sound study's"
        mine, reference = contents(folder / "study"), json.loads((sound / "contents.json").read_text())
        different = sorted(
            name for name in mine.keys() | reference.keys() if mine.get(name) != reference.get(name)
        )
        return f"other results: {', '.join(different[:4])}" if different else ""
    if case.check == "evaluation":
        mine, reference = _tables(folder / "evaluation"), _tables(sound / "evaluation")
        return ", ".join(f"other {name}" for name in mine if mine[name] != reference[name])
    if case.check == "sheet":
        key = {row["id"]: row for row in csv.DictReader((sound / "sheet.key.csv").open(encoding="utf-8-sig"))}
        given = {
            tuple(
                key[row["id"]][c] for c in ("model", "question_id", "epoch", "dimension", "variables")
            ): float(row["grade"])
            for row in csv.DictReader((sound / "sheet.csv").open(encoding="utf-8-sig", newline=""))
        }
        read = pd.read_parquet(next((folder / "evaluation").glob("judges/human/grades.parquet")))
        bad = [
            row
            for row in read.itertuples()
            if given.get((row.model, str(row.question_id), str(row.epoch), row.dimension, row.variables))
            != row.grade
        ]
        return f"{len(bad)} grades that nobody gave" if bad else ""
    raise ValueError(case.check)


def accepted_wrongly(case: Case, folder: Path, out: str) -> str:
    """What is wrong with letting a damaged data file through; empty where only rows of the sound file are
    used, and what was left out is told.
    """
    from compassion_repro.data import rows as data

    file = folder / case.target
    rows = [
        tuple(turn["content"] for turn in row["messages"]) for row in data.load(str(file), "messages").rows
    ]
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
        _other_grade(folder / case.target, int(case.how.split()[1]), rng)
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


def _other_grade(file: Path, which: int, rng: random.Random):
    "Change the grade within a kept reply: the file stays a sound database."
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as replies:
        key, output = replies.execute("SELECT key, output FROM replies ORDER BY key").fetchall()[which]
        letter = "C" if "GRADE: I" in output else "I"
        replies.execute(
            "UPDATE replies SET output = ? WHERE key = ?",
            (output.replace(f"GRADE: {'CI'['IC'.index(letter)]}", f"GRADE: {letter}"), key),
        )


def _verdict(case, folder, sound, status, out, err) -> tuple[str, str]:
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
        return "repaired", wrong(case, folder, sound, out)
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


def summary(results: list[dict]) -> dict:
    "The counts of all cases."
    families = {
        family: {
            outcome: sum(r["family"] == family and r["outcome"] == outcome for r in results)
            for outcome in ("refused", "repaired", "told")
        }
        for family in dict.fromkeys(r["family"] for r in results)
    }
    return {
        "inputs": len(results),
        "good": sum(not r["bad"] for r in results),
        **{
            outcome: sum(r["outcome"] == outcome and not r["bad"] for r in results)
            for outcome in ("refused", "repaired", "told")
        },
        "tracebacks": sum(r["outcome"] == "traceback" for r in results),
        "families": families,
        "bad": [r for r in results if r["bad"]],
    }
