"""Real cases of judging: benchmark folders that people wrote by hand, tasks of their own, judges that fail in their ways."""
import json
import warnings
from pathlib import Path

import pytest
from cases import Case, check, table

from compassion_repro import benchmarks, runner, world
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
    return f"{len(loaded.questions)} questions in {','.join(sorted({q['language'] for q in loaded.questions}))}; {'; '.join(loaded.remarks)}"


def rows(task: str, part: str = "questions", number: int = 0, **values):
    "A benchmark with a row changed."
    def act(folder):
        place = folder_of(task, folder)
        dims = place.with_name("moru_dims") if task == "moru" else place / "dimensions"
        change((dims if part == "dimensions" else place / "questions" if task == "anima" else place) / "train.jsonl", number, **values)
        return opened(task, place, folder)
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
        return [q["messages"][-1]["content"] for q in runner.with_prompts(loaded, folder / "logs")]
    return act


def task(arguments: str) -> str: return f"\n@task\ndef mine(): return Task(**(good | dict({arguments})))\n"


TYPO = "moral consideration, sentience acknowlegement"
CASES = [
    Case("moru one of two tags mistyped", "refused: .*sentience acknowlegement.*did you mean 'sentience acknowledgement'", rows("moru", dimension_tags=TYPO)),
    Case("moru tags in another case", "ok: 5 questions in en,es; $", rows("moru", dimension_tags=" Moral Consideration ,SENTIENCE ACKNOWLEDGEMENT")),
    Case("moru one of two tags unknown", "ok: 5 .*'kindness' is no dimension.*graded on their other tags", rows("moru", dimension_tags="moral consideration, kindness")),
    Case("moru tags with semicolons", "refused: .*names no dimension", rows("moru", dimension_tags="moral consideration; sentience acknowledgement")),
    Case("moru no tags", "refused: .*names no dimension", rows("moru", dimension_tags=None)),
    Case("moru a tag twice", "refused: .*names a dimension twice", rows("moru", dimension_tags="moral consideration, Moral Consideration")),
    Case("moru empty question", "refused: .*row 1 .*empty question", rows("moru", question=" ")),
    Case("moru no language", "refused: .*row 1 .*no language", rows("moru", language="")),
    Case("moru a language nobody knows", "ok: .*'Englisch' is neither.*'English'", rows("moru", language="Englisch")),
    Case("moru one item in en and English", "refused: .*occurs twice in one language", rows("moru", number=1, id=0, language="English")),
    Case("moru dimension twice", "refused: .*occurs twice", rows("moru", "dimensions", dimension="sentience acknowledgement ")),
    Case("moru dimension without a question", "refused: .*empty 'guiding_question'", rows("moru", "dimensions", guiding_question="")),
    Case("moru dimension without indicators", "refused: .*empty 'observable_indicators'", rows("moru", "dimensions", observable_indicators=None)),
    Case("moru byte order marks", "ok: 5 questions", marked("moru")),
    Case("anima byte order marks", "ok: 5 questions", marked("anima")),
    Case("anima a tag in another case", "refused: .*did you mean 'Moral Consideration'", rows("anima", tags=["moral consideration"])),
    Case("anima a tag with a space", "refused: .*did you mean 'Moral Consideration'", rows("anima", tags=["Moral Consideration "])),
    Case("anima a tag unknown", "ok: 4 .*'Kindness' is no dimension.*left out", rows("anima", tags=["Kindness"])),
    Case("anima a tag that is a number", "refused: .*tags are texts", rows("anima", tags=[5])),
    Case("anima Punjab", "ok: 5 questions in en,es,pa; $", rows("anima", language="Punjab")),
    Case("anima a language in another case", "ok: 5 questions in en,es; $", rows("anima", language=" SPANISH")),
    Case("anima a language that is a number", "refused: .*language 5", rows("anima", language=5)),
    Case("anima variables with =", "ok: 5 .*not of the form", rows("anima", variables="animal=dogs")),
    Case("anima a variable that fills no place", "ok: 5 .*fills no place", rows("anima", variables="creature:dogs")),
    Case("anima weight in words", "refused: .*default_weighting 'high'", rows("anima", "dimensions", default_weighting="high")),
    Case("anima id empty", "refused: .*has the id ''", rows("anima", id="")),
    Case("anima question of blanks", "refused: .*empty question", rows("anima", question="  ")),
    Case("own task good", r"ok: \['1 \+ 1\?'\]", own(task(""))),
    Case("own task two items of one id", "refused: .*2 of its questions have the id 'a'", own(task('dataset=[Sample(id="a", input="1?", target="1"), Sample(id="a", input="2?", target="2")]'))),
    Case("own task with tools", r"refused: .*tools \(bash\)", own(task("solver=[use_tools(bash()), generate()]"))),
    Case("own task without a scorer", "refused: .*no scorer", own(task("scorer=None"))),
    Case("own task with images", "refused: .*'image'", own(task("dataset=[Sample(input=image)]"))),
    Case("own task without a dataset", "refused: .*no dataset", own(task("dataset=None"))),
    Case("own task with a sandbox", "refused: .*sandbox", own(task('sandbox="local"'))),
    Case("own task that asks twice", "refused: .*more than once", own(task("solver=[generate(), generate()]"))),
    Case("own task raises at import", "refused: .*ValueError.*nothing here", own(task("") + "\nraise ValueError('nothing here')\n")),
    Case("own task leaves at import", "refused: .*SystemExit", own(task("") + "\nraise SystemExit(3)\n")),
    Case("own task is no Python", "refused: .*SyntaxError", own(task("") + "\ndef yours(:\n")),
    Case("own task needs a package", "refused: .*package no_such_package", own(task("") + "\nimport no_such_package\n")),
    Case("own task raises when called", "refused: .*KeyError", own("\n@task\ndef mine(): return {}['data']\n")),
    Case("own task misnamed", "refused: .*no task called yours", own(task(""), "@yours")),
    Case("own file without a task", "refused: .*has no task", own("\ndef mine(): pass\n", "")),
    Case("own file of two tasks", "refused: .*has 2 tasks", own(task("") + task("").replace("mine", "yours"), "")),
    Case("own file not there", "refused: .*no file", lambda folder: benchmarks.load_named_task(f"{folder}/no.py@mine")),
]


@pytest.mark.parametrize(**table(CASES))
def test_real_judging(case, tmp_path): check(case, tmp_path)
