"""Real cases of judging: benchmark folders that people wrote by hand, tasks of their own, judges that fail in
their ways.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
from cases import Case, problem, table
from judge_server import JUDGE, PaidJudge

from compassion_repro import cli
from compassion_repro.cli import __main__ as program
from compassion_repro.cli import terminal
from compassion_repro.core import errors
from compassion_repro.data import world
from compassion_repro.evaluation import agreement, benchmarks, indicators, inspect_runner
from compassion_repro.evaluation import scoring as judging
from compassion_repro.evaluation.grades import no_grade_line
from compassion_repro.evaluation.replies import REPLIES, Replies
from compassion_repro.pipeline import evaluate, run
from compassion_repro.stats.claims import read_claims
from compassion_repro.store import folder as store
from compassion_repro.study import Benchmark

SIZE = {"en": 3, "es": 2}


# ---- rows of a benchmark


def folder_of(task: str, folder: Path) -> Path:
    "A good folder of a benchmark."
    return world.write_benchmark(task, folder / "mine", SIZE)


def change(file: Path, number: int = 0, **values):
    "Change columns of a row; None of all columns takes the row out."
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number] |= values
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(task: str, place: Path, folder: Path) -> str:
    "What the user is told of a benchmark."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = benchmarks.load_benchmark("mine", Benchmark(task=task, data=str(place)), folder / "cache")
    return (
        f"{len(loaded.questions)} questions in {','.join(sorted({q['language'] for q in loaded.questions}))};"
        f" {'; '.join(loaded.remarks)}"
    )


def rows(task: str, part: str = "questions", number: int = 0, **values):
    "A benchmark with a row changed."

    def act(folder):
        place = folder_of(task, folder)
        dims = place.with_name("moru_dims") if task == "moru" else place / "dimensions"
        change(
            (dims if part == "dimensions" else place / "questions" if task == "anima" else place)
            / "train.jsonl",
            number,
            **values,
        )
        return opened(task, place, folder)

    return act


def twice(task: str, *copied: str):
    "A benchmark whose second question is the first, with other spaces, and has these columns of it."

    def act(folder):
        place = folder_of(task, folder / "read")
        file = (place / "questions" if task == "anima" else place) / "train.jsonl"
        row = json.loads(file.read_text().splitlines()[0])
        question = row["question"].replace(" ", "  ")
        return rows(task, number=1, question=question, **{name: row[name] for name in copied})(folder)

    return act


def two_files(folder: Path) -> str:
    "Questions in a second file, which the library passes over beside one that is named after a split."
    place = folder_of("anima", folder)
    text = (place / "questions/train.jsonl").read_text()
    (place / "questions/more.jsonl").write_text(text.replace('"id": "', '"id": "more-').replace("?", "??"))
    return opened("anima", place, folder)


def written(spoil):
    "The file of MORU's questions in other bytes."

    def act(folder):
        place = folder_of("moru", folder)
        file = place / "train.jsonl"
        file.write_bytes(spoil(file.read_text(encoding="utf-8")))
        return opened("moru", place, folder)

    return act


def marked(task: str):
    "Every text file begins with a byte order mark, as some editors write it."

    def act(folder):
        place = folder_of(task, folder)
        for file in (*place.parent.rglob("*.jsonl"), *place.parent.rglob("*.md")):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        return opened(task, place, folder)

    return act


# ---- tasks of a user's own

HEAD = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import Score, includes, scorer, mean
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash
good = dict(dataset=[Sample(input="1 + 1?", target="2")], scorer=includes())
image = [ChatMessageUser(content=[ContentText(text="What?"), ContentImage(image="data:image/png;base64,AA==")])]
"""


def own(task: str, name: str = "@mine", head: str = HEAD):
    "A task in a file, with its prompts read."

    def act(folder):
        (folder / "own.py").write_text(head + task)
        loaded = benchmarks.load_named_task(f"{folder}/own.py{name}")
        return [q["messages"][-1]["content"] for q in inspect_runner.with_prompts(loaded, folder / "logs")]

    return act


def task(arguments: str) -> str:
    return f"\n@task\ndef mine(): return Task(**(good | dict({arguments})))\n"


# ---- judges that fail in their ways


def judged(judge: str = JUDGE, data: str = "world:anima", **server):
    "Two answers under a judge behind a server that answers so."

    def act(folder):
        said = []
        with PaidJudge(latency=0, **server) as paid, mock.patch.dict(os.environ, paid.environment()):
            benchmark = Benchmark(task="anima", data=data, size={"en": 2}, epochs=1)
            replies = Replies(folder / "replies.sqlite")
            loaded = judging.load_task(
                "anima", benchmark, judge, folder / "cache", {"max_retries": 1}, replies
            )
            rows = [dict(q, model="m", seed=1, epoch=1, text="A dog.") for q in loaded.questions]
            grades, _ = judging.judge_answers(
                pd.DataFrame(rows), {"anima": loaded}, judge, folder / "logs", report=said.append
            )
        told = [line for line in said if "asking again" in line][:1]
        return f"{grades.grade.notna().sum()} of {len(grades)} graded; {no_grade_line(grades)}; {told}"

    return act


def message(content: object) -> bytes:
    "An answer of OpenAI's API that says this."
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
    ).encode()


# ---- the store of replies


def store_of(spoil):
    "A store with one reply that was paid for, spoilt; what the user is told."

    def act(folder):
        file = folder / REPLIES
        with contextlib.closing(Replies(file)) as good:
            good.put("key", "judge", indicators.judge_output("judge", "Is it?", "GRADE: C"))
        with contextlib.ExitStack() as stack:
            spoil(file, stack)
            replies = Replies(file, wait=0.1)
            with replies.alone(lambda line: None):
                return f"{replies.get('key').completion}"

    return act


def _lock_is_a_folder(file, stack):
    file.with_suffix(".lock").mkdir()


def _is_a_folder(file, stack):
    file.unlink()
    file.mkdir()


def _no_database(file, stack):
    file.write_bytes(b"SQLite format 3 it is not")


def _held(file, stack):
    other = stack.enter_context(contextlib.closing(sqlite3.connect(file, isolation_level=None)))
    other.execute("BEGIN IMMEDIATE")


def _read_only(file, stack):
    "As for a user who may not write: root may, so the connection is opened as read-only."
    connect = sqlite3.connect
    stack.enter_context(
        mock.patch.object(
            sqlite3, "connect", lambda name, **more: connect(f"file:{name}?mode=ro", uri=True, **more)
        )
    )


def _lock_denied(file, stack):
    open_ = Path.open

    def denied(path, *more, **options):
        if path.suffix == ".lock":
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *more, **options)

    stack.enter_context(mock.patch.object(Path, "open", denied))


TYPO = "moral consideration, sentience acknowlegement"
CASES = [
    Case(
        "moru one of two tags mistyped",
        "refused: .*sentience acknowlegement.*did you mean 'sentience acknowledgement'",
        rows("moru", dimension_tags=TYPO),
    ),
    Case(
        "moru tags in another case",
        "ok: 5 questions in en,es; $",
        rows("moru", dimension_tags=" Moral Consideration ,SENTIENCE ACKNOWLEDGEMENT"),
    ),
    Case(
        "moru one of two tags unknown",
        "ok: 5 .*'kindness' is no dimension.*graded on their other tags",
        rows("moru", dimension_tags="moral consideration, kindness"),
    ),
    Case(
        "moru tags with semicolons",
        "refused: .*names no dimension",
        rows("moru", dimension_tags="moral consideration; sentience acknowledgement"),
    ),
    Case("moru no tags", "refused: .*names no dimension", rows("moru", dimension_tags=None)),
    Case(
        "moru a tag twice",
        "refused: .*names a dimension twice",
        rows("moru", dimension_tags="moral consideration, Moral Consideration"),
    ),
    Case("moru empty question", "refused: .*row 1 .*empty question", rows("moru", question=" ")),
    Case("moru no language", "refused: .*row 1 .*no language", rows("moru", language="")),
    Case(
        "moru a language nobody knows",
        "ok: .*'Englisch' is neither.*'English'",
        rows("moru", language="Englisch"),
    ),
    Case(
        "moru one item in en and English",
        "refused: .*occurs twice in one language",
        rows("moru", number=1, id=0, language="English"),
    ),
    Case(
        "moru dimension twice",
        "refused: .*occurs twice",
        rows("moru", "dimensions", dimension="sentience acknowledgement "),
    ),
    Case(
        "moru dimension without a question",
        "refused: .*empty 'guiding_question'",
        rows("moru", "dimensions", guiding_question=""),
    ),
    Case(
        "moru dimension without indicators",
        "refused: .*empty 'observable_indicators'",
        rows("moru", "dimensions", observable_indicators=None),
    ),
    Case(
        "moru in Latin-1",
        "refused: .*train.jsonl is not UTF-8 text: save it as UTF-8",
        written(lambda text: text.replace("a", "ä").encode("latin-1")),
    ),
    Case("moru in UTF-16", "refused: .*is not UTF-8 text", written(lambda text: text.encode("utf-16"))),
    Case(
        "moru as Git LFS's note",
        "refused: .*train.jsonl: .*git lfs pull",
        written(lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    Case("moru byte order marks", "ok: 5 questions", marked("moru")),
    Case("anima byte order marks", "ok: 5 questions", marked("anima")),
    Case(
        "anima a tag in another case",
        "refused: .*did you mean 'Moral Consideration'",
        rows("anima", tags=["moral consideration"]),
    ),
    Case(
        "anima a tag with a space",
        "refused: .*did you mean 'Moral Consideration'",
        rows("anima", tags=["Moral Consideration "]),
    ),
    Case(
        "anima a tag unknown",
        "ok: 4 .*'Kindness' is no dimension.*left out",
        rows("anima", tags=["Kindness"]),
    ),
    Case("anima a tag that is a number", "refused: .*tags are texts", rows("anima", tags=[5])),
    Case("anima Punjab", "ok: 5 questions in en,es,pa; $", rows("anima", language="Punjab")),
    Case(
        "anima a language in another case", "ok: 5 questions in en,es; $", rows("anima", language=" SPANISH")
    ),
    *[
        Case(
            f"anima a language as {said}",
            "ok: 5 questions in en,es; $",
            rows("anima", number=3, language=said),
        )
        for said in ("Español", "spa", "Spanish (Mexico)", "es-419")
    ],
    *[
        Case(
            f"{task} a question twice",
            "ok: 5 questions in en,es; 1 question repeats another word for word .*each of them counts$",
            twice(task, *copied),
        )
        for task, copied in (("anima", ["variables"]), ("moru", []))
    ],
    Case(
        "anima a question of other variables",
        "ok: 5 questions in en,es; $",
        twice("anima"),
    ),
    Case("anima a file that the task does not read", "ok: 5 .*leaves out 5 .*does not read", two_files),
    Case("anima a language that is a number", "refused: .*language 5", rows("anima", language=5)),
    Case("anima variables with =", "ok: 5 .*not of the form", rows("anima", variables="animal=dogs")),
    Case(
        "anima a variable that fills no place",
        "ok: 5 .*fills no place",
        rows("anima", variables="creature:dogs"),
    ),
    Case(
        "anima weight in words",
        "refused: .*default_weighting 'high'",
        rows("anima", "dimensions", default_weighting="high"),
    ),
    Case("anima id empty", "refused: .*has the id ''", rows("anima", id="")),
    Case("anima question of blanks", "refused: .*empty question", rows("anima", question="  ")),
    Case("own task good", r"ok: \['1 \+ 1\?'\]", own(task(""))),
    Case(
        "own task two items of one id",
        "refused: .*2 of its questions have the id 'a'",
        own(task('dataset=[Sample(id="a", input="1?", target="1"), Sample(id="a", input="2?", target="2")]')),
    ),
    Case(
        "own task with tools",
        r"refused: .*tools \(bash\)",
        own(task("solver=[use_tools(bash()), generate()]")),
    ),
    Case("own task without a scorer", "refused: .*no scorer", own(task("scorer=None"))),
    Case("own task with images", "refused: .*'image'", own(task("dataset=[Sample(input=image)]"))),
    Case("own task without a dataset", "refused: .*no dataset", own(task("dataset=None"))),
    Case("own task with a sandbox", "refused: .*sandbox", own(task('sandbox="local"'))),
    Case(
        "own task that asks twice", "refused: .*more than once", own(task("solver=[generate(), generate()]"))
    ),
    Case(
        "own task raises at import",
        "refused: .*ValueError.*nothing here",
        own(task("") + "\nraise ValueError('nothing here')\n"),
    ),
    Case("own task leaves at import", "refused: .*SystemExit", own(task("") + "\nraise SystemExit(3)\n")),
    Case("own task is no Python", "refused: .*SyntaxError", own(task("") + "\ndef yours(:\n")),
    Case(
        "own task needs a package",
        "refused: .*package no_such_package",
        own(task("") + "\nimport no_such_package\n"),
    ),
    Case(
        "own task raises when called", "refused: .*KeyError", own("\n@task\ndef mine(): return {}['data']\n")
    ),
    Case("own task misnamed", "refused: .*no task called yours", own(task(""), "@yours")),
    Case("own file without a task", "refused: .*has no task", own("\ndef mine(): pass\n", "")),
    Case(
        "own file of two tasks",
        "refused: .*has 2 tasks",
        own(task("") + task("").replace("mine", "yours"), ""),
    ),
    Case(
        "judge 200 with an error body",
        "refused: .*quota is used up.*look at what came back",
        judged(body=b'{"error": {"message": "quota is used up"}}'),
    ),
    Case(
        "judge 200 with an empty body",
        "refused: .*no reply in it: nothing; look at what came back",
        judged(body=b""),
    ),
    Case(
        "judge 200 with a page",
        "refused: .*Bad gateway.*look at what came back",
        judged(body=b"<html>Bad gateway</html>"),
    ),
    Case(
        "judge 200 without choices", "refused: .*no reply in it: .*choices", judged(body=b'{"choices": []}')
    ),
    Case("judge half a surrogate pair", "ok: 4 of 4 graded", judged(text="Half \ud800.\n\nGRADE: C")),
    Case(
        "judge without a grade",
        "ok: 0 of 4 graded; none of the 4 replies .*'I cannot help.'",
        judged(text="I cannot help."),
    ),
    Case(
        "judge with empty replies",
        "ok: 0 of 4 graded; none of the 4 replies .*'nothing at all'",
        judged(text=""),
    ),
    Case("judge with null content", "ok: 0 of 4 graded; none of the 4 replies", judged(body=message(None))),
    Case(
        "judge asks for an hour",
        "refused: .*left alone for 60 minutes.*replies so far are kept",
        judged(refusal=(429, {"error": {"message": "slow down"}}), headers={"Retry-After": "3600"}),
    ),
    Case(
        "judge key refused",
        "refused: .*no such key.*check the judge's name, its package and its key",
        judged(refusal=(401, {"error": {"message": "no such key"}})),
    ),
    Case("store good", "ok: GRADE: C", store_of(lambda file, stack: None)),
    Case(
        "store held by another program",
        "refused: .*close that one and run the same command again, nothing in it is lost$",
        store_of(_held),
    ),
    Case("store read-only", "refused: .*writable; what it holds is good$", store_of(_read_only)),
    Case("store is a folder", "refused: .*it is a folder", store_of(_is_a_folder)),
    Case("store damaged", "refused: .*put a copy back that is whole", store_of(_no_database)),
    Case(
        "store lock is a folder",
        "refused: .*lock of the judge's replies, is a folder",
        store_of(_lock_is_a_folder),
    ),
    Case("store lock denied", "refused: .*cannot be written", store_of(_lock_denied)),
    Case(
        "own file not there",
        "refused: .*no file",
        lambda folder: benchmarks.load_named_task(f"{folder}/no.py@mine"),
    ),
]


@pytest.mark.parametrize(**table(CASES))
def test_real_judging(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong


# ---- scores that mean nothing


def test_a_judge_that_cannot_read_the_rubric_gives_no_score(tmp_path, capsys):
    "Rubrics for people quote no phrases: the deterministic judges find nothing to look for."
    place = folder_of("anima", tmp_path)
    change(
        place / "dimensions" / "train.jsonl", observable_indicators="It names the interests of the animal."
    )
    words = [
        "eval",
        "world:base",
        "--bench",
        f"anima={place}",
        "--judge",
        "indicator",
        "--epochs",
        "1",
        "--max-tokens",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert "no score by 'indicator'" in out and "compassion-repro judge" in out
    assert evaluate.summary(tmp_path / "out").score.isna().all()


def test_verdicts_do_not_need_the_stages(study_copy):
    """A copy without its stages has the same verdicts; without the record of training, nothing is claimed of
    it.
    """
    study = store.Study(study_copy)

    def verdicts():
        return {record.reading: record.verdict for record in run.analyse(study, page=False).records}

    before = verdicts()
    assert before == {
        record.reading: record.verdict for record in read_claims(study_copy / "claims.json").records
    }
    for folder in study_copy.glob("seed-*"):
        shutil.rmtree(folder)
    assert verdicts() == before
    (study_copy / run.TRAINING).unlink()
    after = run.analyse(study, page=False).records
    assert not {record.verdict for record in after} & {"supported", "contradicted"}
    assert any("not known whether sft-help was trained" in record.reason for record in after)
    (study_copy / run.TRAINING).write_text("{")
    with pytest.raises(errors.InputError, match="training.json is damaged"):
        run.analyse(study, page=False)


# ---- what others wrote, in a terminal and in a spreadsheet


def test_control_characters_are_shown_and_not_obeyed(capsys, monkeypatch):
    bad = "\x1b[2Jname\u202egpj\x9b31m"

    def act(args):
        terminal.show(terminal.plain_table(["model"], [[bad]], title=bad), bad)
        terminal.print(bad)
        with terminal.talking() as (say, report):
            say(bad)
        raise errors.InputError(bad)

    monkeypatch.setattr(
        program, "build_parser", lambda: SimpleNamespace(parse_args=lambda words: SimpleNamespace(action=act))
    )
    assert cli.main(["run"]) == 2
    shown = "".join(capsys.readouterr())
    assert shown.count(r"\x1b[2Jname") == 6 and not set(shown) & {"\x1b", "\x9b", "\u202e"}


def test_formulas_in_a_sheet_are_text(tmp_path):
    texts = ["=HYPERLINK(1)", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", "plain"]
    units = pd.DataFrame(
        [
            dict(
                id=f"i{i}",
                model=text,
                seed=1,
                benchmark="anima",
                question_id=text,
                epoch=1,
                dimension="Care",
                variables="{}",
                item_id=text,
                language="en",
                question=text,
                answer=text,
                guiding_question="Does it?",
                indicators=text,
            )
            for i, text in enumerate(texts)
        ]
    )
    agreement.write_sheet(units, tmp_path / "sheet.csv")
    sheet = pd.read_csv(tmp_path / "sheet.csv", encoding="utf-8-sig")
    for file in (tmp_path / "sheet.csv", tmp_path / "sheet.key.csv"):
        cells = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_numpy().ravel()
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    sheet.assign(grade=1).to_csv(tmp_path / "sheet.csv", index=False, quoting=1)
    read = agreement.read_sheet(tmp_path / "sheet.csv")
    assert read.model.str.strip().tolist() == [text.strip() for text in texts] and (read.grade == 1).all()
