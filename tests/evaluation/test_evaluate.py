"""Bad benchmark folders, the wrong-data trap, unreliable judges, and runs without a network."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings

import pandas as pd
import pytest
import rich
from inspect_ai._util.error import pip_dependency_error
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_evals.anima import dataset as anima_data

from compassion_repro.core.errors import InputError
from compassion_repro.data import hub, world
from compassion_repro.evaluation import benchmarks, indicators, scoring
from compassion_repro.evaluation import generate as evaluate
from compassion_repro.evaluation import grades as grades_module
from compassion_repro.evaluation.grades import GRADE_COLUMNS, mean_scores, official_metrics
from compassion_repro.study import Benchmark, Generation
from compassion_repro.training import templates

SIZE = {"en": 3, "es": 2}
QUIET = {"report": lambda line: None}


@modelapi(name="fickle")
class FickleJudge(ModelAPI):
    "A judge whose model name says what it does, and when."

    async def generate(self, input, tools, tool_choice, config):
        parts = indicators.read_judge_prompt(input[-1].text)
        if self.model_name == "down" or self.model_name == "sometimes" and "epoch 1" in parts["submission"]:
            raise RuntimeError("401 no such key")
        if self.model_name == "interrupts":
            signal.raise_signal(signal.SIGINT)
        first = parts["dimension"].lower() == DIMENSIONS[0].lower()
        mute = (
            self.model_name == "mute"
            or first
            and (
                self.model_name == "one-dimension"
                or self.model_name == "one-epoch"
                and "epoch 1" in parts["submission"]
            )
        )
        output = ModelOutput.from_content(
            self.model_name, "I cannot say." if mute else "It does.\n\nGRADE: C"
        )
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    async def count_text_tokens(self, text):
        return len(text)


DIMENSIONS = list(
    dict.fromkeys(name for row in world.benchmark_questions("anima", SIZE) for name in row["dimensions"])
)


@pytest.fixture
def folder(tmp_path):
    "An ANIMA folder of a user's own."
    return world.write_benchmark("anima", tmp_path / "mine", SIZE)


@pytest.fixture
def minds(tmp_path):
    "A MORU folder of a user's own, dimensions beside it."
    return world.write_benchmark("moru", tmp_path / "mine", SIZE)


def load(data, cache, task="anima", judge="indicator", epochs=2, **fields):
    return scoring.load_task(
        "mine", Benchmark(task=task, data=str(data), epochs=epochs, **fields), judge, cache
    )


def answered(loaded, text="An answer of epoch {epoch}."):
    keys = ("benchmark", "language", "item_id", "question_id")
    rows = [
        dict(model="mid", seed=0, **{k: q[k] for k in keys}, epoch=e, text=text.format(epoch=e))
        for q in loaded.questions
        for e in range(1, q["epochs"] + 1)
    ]
    return pd.DataFrame(rows)


def judged(loaded, answers, tmp_path):
    return scoring.judge_answers(
        answers, {"mine": loaded}, loaded.judge, tmp_path / "logs", study="test", **QUIET
    )


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# ---- folders that are not benchmarks


def _no_readme(place):
    (place / "README.md").unlink()


def _empty_readme(place):
    (place / "README.md").write_text("Questions.")


def _broken_readme(place):
    (place / "README.md").write_text("---\n[: :\n---\n")


def _latin_readme(place):
    (place / "README.md").write_bytes(b"caf\xe9")


def _null_configs(place):
    (place / "README.md").write_text("---\nconfigs: null\n---\n")


def _number_configs(place):
    (place / "README.md").write_text("---\nconfigs: 5\n---\n")


def _no_questions(place):
    shutil.rmtree(place / "questions")


def _no_dimensions(place):
    shutil.rmtree(place / "dimensions")


def _empty_questions(place):
    (place / "questions" / "train.jsonl").write_text("")


def _truncated(place):
    (place / "questions" / "train.jsonl").write_text('{"id": 1, "quest')


def _wrong_schema(place):
    (place / "questions" / "train.jsonl").write_text('{"prompt": "Why?"}\n')


def _not_objects(place):
    (place / "questions" / "train.jsonl").write_text('["Why?"]\n')


def _not_utf8(place):
    (place / "questions" / "train.jsonl").write_bytes(b'{"id": "\xff"}\n')


def _broken_parquet(place):
    (place / "questions" / "more.parquet").write_bytes(b"PAR1")


def _not_text(place):
    _change(place, question=5)


def _no_known_dimension(place):
    _change(place, tags=["Kindness"])


def _tags_are_text(place):
    _change(place, tags="Kindness")


def _same_id(place):
    _change(place, id="same")


def _change(place, **values):
    file = place / "questions" / "train.jsonl"
    file.write_text(
        "".join(json.dumps({**json.loads(line), **values}) + "\n" for line in file.read_text().splitlines())
    )


@pytest.mark.parametrize(
    "spoil, word",
    [
        (_no_readme, "no README.md"),
        (_empty_readme, "front matter"),
        (_broken_readme, "front matter"),
        (_latin_readme, "UTF-8"),
        (_null_configs, "front matter"),
        (_number_configs, "front matter"),
        (_no_questions, "questions"),
        (_no_dimensions, "dimensions"),
        (_empty_questions, "no rows"),
        (_truncated, "line 1 is not JSON"),
        (_wrong_schema, "has no 'id'"),
        (_not_objects, "has no 'id'"),
        (_not_utf8, "is not UTF-8 text"),
        (_broken_parquet, "cannot be read"),
        (_same_id, "appears twice"),
        (_not_text, "wrong type"),
        (_no_known_dimension, "No valid samples"),
        (_tags_are_text, "wrong type"),
    ],
)
def test_bad_folder_is_one_clear_line(folder, tmp_path, spoil, word):
    spoil(folder)
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache")
    assert_one_line(error, word)


@pytest.mark.parametrize(
    "data, word",
    [
        ("world:birds", "unknown embedded benchmark"),
        ("./nowhere", "neither an existing folder"),
        ("owner/name", "names no revision"),
        ("a b", "neither"),
    ],
)
def test_bad_source_is_one_clear_line(tmp_path, data, word):
    with pytest.raises(InputError) as error:
        load(data, tmp_path / "cache", size=SIZE)
    assert_one_line(error, word)


@pytest.mark.parametrize(
    "number, word", [(100_000, "at most 35840 questions"), (0, "whole number"), (-3, "whole number")]
)
def test_a_size_that_cannot_be(tmp_path, number, word):
    with pytest.raises(InputError) as error:
        world.write_benchmark("anima", tmp_path, {"en": number})
    assert_one_line(error, word)


def test_the_largest_size_can_be_had():
    assert len({row["question"] for row in world.benchmark_questions("moru", {"en": 17_920})}) == 17_920


def test_what_belongs_together_travels_to_answers_and_scores(folder, tmp_path):
    "Translations share the item, frames are clusters; questions whose rows say neither have none."
    file = folder / "questions" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    bare = [{k: v for k, v in row.items() if k not in ("item_id", "cluster")} for row in rows]
    for given, items in ((rows, 3), (bare, 5)):
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        loaded = load(folder, tmp_path / "cache", epochs=1)
        _, scores = judged(loaded, answered(loaded), tmp_path / str(items))
        overall = scores[scores.dimension == "overall"].set_index("question_id")
        assert overall.item_id.nunique() == items
        for row in given:
            found = overall.loc[str(row["id"])]
            assert found.item_id == row.get("item_id", row["id"])
            assert found.cluster == row["cluster"] if "cluster" in row else pd.isna(found.cluster)


@pytest.mark.parametrize("column", ["item_id", "cluster"])
def test_a_cluster_that_is_a_list(folder, tmp_path, column):
    file = folder / "questions" / "train.jsonl"
    first, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in (first | {column: ["a"]}, *rest)))
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache")
    assert_one_line(error, f"row 1 has a '{column}' of the wrong type (list)")


def test_a_file_is_not_a_benchmark(folder, tmp_path):
    with pytest.raises(InputError) as error:
        load(folder / "README.md", tmp_path / "cache")
    assert_one_line(error, "is a file")


def test_moru_needs_its_dimensions(minds, tmp_path):
    (minds.parent / "moru_dims").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as error:
        load(minds, tmp_path / "cache", "moru")
    assert_one_line(error, "benchmarks.mine.dimensions")
    loaded = load(minds, tmp_path / "cache", "moru", dimensions=str(tmp_path / "elsewhere"))
    assert len(loaded.questions) == 5 and {q["item_id"] for q in loaded.questions} == {
        str(json.loads(line)["id"]) for line in (minds / "train.jsonl").read_text().splitlines()
    }


def test_moru_id_with_two_questions(minds, tmp_path):
    "The same row twice is upstream's own habit; another question under the id is a mistake."
    file = minds / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def write(*more):
        file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *more)))

    write(rows[0])
    assert len(load(minds, tmp_path / "cache", "moru").questions) == 5
    write({**rows[0], "question": "Another?"})
    with pytest.raises(InputError) as error:
        load(minds, tmp_path / "cache", "moru")
    assert_one_line(error, "id 0 appears twice in language 'en'")


@pytest.mark.parametrize("spoiled", ["moru", "moru_dims"])
@pytest.mark.parametrize("content", [b"caf\xe9", b"---\nconfigs: 5\n---\n"])
def test_moru_readme_that_cannot_be_read(minds, tmp_path, spoiled, content):
    (minds.parent / spoiled / "README.md").write_bytes(content)
    with pytest.raises(InputError) as error:
        load(minds, tmp_path / "cache", "moru")
    assert_one_line(error, "mine")


@pytest.mark.parametrize("task", ["anima", "moru"])
@pytest.mark.parametrize("place, cache", [("a[1] b", "cache"), ("a", "c[1]{2}"), ("a*?", "c [x]")])
def test_paths_that_look_like_patterns(tmp_path, task, place, cache):
    mine = world.write_benchmark(task, tmp_path / place, SIZE)
    if task == "anima":
        mine = mine.rename(mine.parent / "my [2] animals")
    loaded = load(mine, tmp_path / cache, task)
    _, scores = scoring.judge_answers(
        answered(loaded), {"mine": loaded}, "indicator", tmp_path / cache / "logs", **QUIET
    )
    assert len(loaded.questions) == 5 and scores.score.notna().all()
    assert len(official_metrics(tmp_path / cache / "logs"))


def test_hub_data_is_left_to_the_official_loader(folder, tmp_path, monkeypatch):
    "A pinned snapshot goes to the task with its revision, which is part of ANIMA's judge prompt."
    wanted = []

    def snapshot(source, kind):
        wanted.append((source, kind))
        revision = source.partition("@")[2]
        return hub.Snapshot(folder.rename(folder.parent / revision), revision)

    monkeypatch.setattr(hub, "snapshot", snapshot)
    loaded = load(anima_data.DATASET_REPO_ID, tmp_path / "cache", judge="fickle/fine")
    assert wanted == [(f"{anima_data.DATASET_REPO_ID}@{anima_data.DATASET_DEFAULT_REVISION}", "dataset")]
    assert loaded.provenance["revision"] == anima_data.DATASET_DEFAULT_REVISION and len(loaded.questions) == 5
    judged(loaded, answered(loaded), tmp_path)
    log = read_eval_log(list_eval_logs(str(tmp_path / "logs"))[0], resolve_attachments=True)
    prompts = [e.input[-1].text for e in log.samples[0].events if e.event == "model"]
    assert prompts and all(
        f"ANIMA Revision: {anima_data.DATASET_DEFAULT_REVISION}" in prompt for prompt in prompts
    )


def test_read_only_cache(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache")
    assert_one_line(error, "cannot be written")


@pytest.mark.parametrize("judge", ["", "indicators", "gemini", None])
def test_the_judge_is_named(folder, tmp_path, judge):
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache", judge=judge)
    assert_one_line(error, "neither 'indicator'")


@pytest.mark.parametrize("judge", ["saved/x", "none/none"])
def test_a_judge_that_never_answers(folder, tmp_path, judge):
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache", judge=judge)
    assert_one_line(error, "cannot judge")


@modelapi(name="lacking")
class LackingJudge(ModelAPI):
    "A judge whose package is not installed, in Inspect's words."

    def __init__(self, *args, **kwargs):
        raise pip_dependency_error("Lacking API", ["lacking"])

    async def generate(self, input, tools, tool_choice, config):
        return ModelOutput()


def test_a_judge_whose_package_is_missing(folder, tmp_path):
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache", judge="lacking/model")
    assert_one_line(error, "Lacking API requires", "Install with: pip install lacking")
    assert "bold" not in str(error.value)


def test_unknown_provider_is_one_clear_line(folder, tmp_path):
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache", judge="nobody/model")
    assert_one_line(error, "nobody/model")


# ---- the wrong-data trap


@pytest.mark.parametrize("task", ["anima", "moru"])
def test_two_folders_of_one_name(tmp_path, task):
    "Same basename, same README, other questions: each gives its own, in either order and again."
    loaded = {}
    for size in (2, 3, 2):
        place = world.write_benchmark(task, tmp_path / str(size), {"en": size})
        file = next(place.rglob("train.jsonl")) if task == "moru" else place / "questions" / "train.jsonl"
        file.write_text(
            "".join(
                json.dumps({**json.loads(line), "question": f"Of {size}: {i}?"}) + "\n"
                for i, line in enumerate(file.read_text().splitlines())
            )
        )
        loaded[size] = load(place, tmp_path / "cache", task)
        assert [q["question"] for q in loaded[size].questions] == [f"Of {size}: {i}?" for i in range(size)]
    assert loaded[2].provenance["content"] != loaded[3].provenance["content"]


def test_a_folder_that_changes_under_its_name(folder, tmp_path):
    before = load(folder, tmp_path / "cache")
    _change(folder, question="Changed?")
    after = load(folder, tmp_path / "cache")
    assert {q["question"] for q in after.questions} == {"Changed?"} and len(after.questions) == len(
        before.questions
    )


def test_wrong_rows_are_noticed(folder, tmp_path, monkeypatch):
    "If the library hands back other rows than the folder's, that is an error."
    other = load(world.write_benchmark("leak", tmp_path / "other", {"en": 3}), tmp_path / "cache")
    monkeypatch.setattr(benchmarks, "anima", lambda **arguments: other.task)
    with pytest.raises(InputError) as error:
        load(folder, tmp_path / "cache")
    assert_one_line(error, "was loaded but is not in")


def test_rows_that_the_task_leaves_out_are_reported(folder, tmp_path):
    file = folder / "questions" / "train.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "tags": []}), *rest]))
    with pytest.warns(UserWarning, match="left out 1 of 5"):
        loaded = load(folder, tmp_path / "cache")
    assert len(loaded.questions) == 4 and loaded.provenance["rows"] == 4
    assert loaded.provenance["left_out"] == [str(json.loads(first)["id"])]


@pytest.mark.parametrize(
    "values", [{"tags": None}, {"tags": ["Unknown"]}, {"question": None}, {"question": ""}]
)
@pytest.mark.parametrize("published", [False, True])
def test_every_kind_of_left_out_row_is_named(folder, tmp_path, monkeypatch, values, published):
    file = folder / "questions" / "train.jsonl"
    *rest, last = file.read_text().splitlines()
    file.write_text("\n".join([*rest, json.dumps({**json.loads(last), **values})]))
    monkeypatch.setattr(hub, "snapshot", lambda source, kind: hub.Snapshot(folder, "abc"))
    with pytest.warns(UserWarning, match="left out 1 of 5"):
        loaded = load("owner/name@abc" if published else folder, tmp_path / "cache")
    assert loaded.provenance["left_out"] == [str(json.loads(last)["id"])]


def test_a_users_benchmark_is_run_whole_and_parquet_works(folder, tmp_path):
    file = folder / "questions" / "train.jsonl"
    pd.DataFrame([json.loads(line) for line in file.read_text().splitlines()]).to_parquet(
        file.with_suffix(".parquet")
    )
    file.unlink()
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("questions/*.jsonl", "questions/*.parquet"))
    loaded = load(folder, tmp_path / "cache", size={"en": 1})
    assert len(loaded.questions) == 5 and {q["language"] for q in loaded.questions} == {"en", "es"}


# ---- judges


def test_scores_equal_the_official_metrics(folder, minds, tmp_path):
    phrase = indicators.indicator_phrases(world.rubric("anima")[0]["observable_indicators"])[0]
    for task, place in (("anima", folder), ("moru", minds)):
        loaded = load(place, tmp_path / "cache", task, epochs=3)
        answers = answered(loaded)
        answers.loc[answers.index % 3 == 0, "text"] = f"First, {phrase}."
        logs = tmp_path / task
        grades, scores = scoring.judge_answers(answers, {"mine": loaded}, "indicator", logs, **QUIET)
        ours = (
            mean_scores(scores)
            .replace({"dimension": {"overall": "overall_mean"}})
            .set_index("dimension")
            .score
        )
        official = official_metrics(logs).set_index("metric").value
        assert 0 < ours["overall_mean"] < 1 and len(ours) > 2
        assert all(abs(official[name] - value) < 1e-12 for name, value in ours.items())
        assert grades.attempted.all() and grades.grade.isin([0, 1]).all() and scores.score.notna().all()
        assert len(scores) == len(answers) * 3 and scores.epoch.min() == 1


@pytest.mark.parametrize("task", ["anima", "moru"])
def test_a_dimension_that_never_parses(folder, minds, tmp_path, task):
    "ANIMA's explanation fails on it upstream; here it is a null among grades."
    loaded = load(
        folder if task == "anima" else minds, tmp_path / "cache", task, judge="fickle/one-dimension"
    )
    grades, scores = judged(loaded, answered(loaded), tmp_path)
    muted = grades.dimension.str.lower() == DIMENSIONS[0].lower()
    assert 0 < muted.sum() < len(grades)
    assert grades[muted].grade.isna().all() and (grades[~muted].grade == 1).all() and grades.attempted.all()
    assert (grades[muted].reply == "I cannot say.").all()
    assert (scores[scores.dimension == "overall"].score == 1).all()  # the mean of what was graded
    assert scores[scores.dimension.str.lower() == DIMENSIONS[0].lower()].score.isna().all()


@pytest.mark.parametrize("task", ["anima", "moru"])
def test_dimensions_that_differ_between_epochs(folder, minds, tmp_path, task):
    "Upstream cannot average them; the epoch that was graded counts."
    loaded = load(folder if task == "anima" else minds, tmp_path / "cache", task, judge="fickle/one-epoch")
    grades, scores = judged(loaded, answered(loaded), tmp_path)
    muted = (grades.dimension.str.lower() == DIMENSIONS[0].lower()) & (grades.epoch == 1)
    assert (grades.grade.isna() == muted).all() and muted.any()
    official = official_metrics(tmp_path / "logs").set_index("metric").value
    assert official["overall_mean"] == 1 == mean_scores(scores).score.min()


@pytest.mark.parametrize("task", ["anima", "moru"])
def test_a_judge_that_never_says_a_grade(folder, minds, tmp_path, task):
    loaded = load(folder if task == "anima" else minds, tmp_path / "cache", task, judge="fickle/mute")
    grades, scores = judged(loaded, answered(loaded), tmp_path)
    assert len(scores) == 10 * 3 and grades.attrs["unjudged"] == 0
    assert grades.grade.isna().all() and grades.attempted.all() and scores.score.isna().all()


def test_a_judge_that_fails_now_and_then(folder, tmp_path):
    loaded = load(folder, tmp_path / "cache", judge="fickle/sometimes")
    with pytest.warns(UserWarning, match="5 of 10 answers could not be judged"):
        grades, scores = judged(loaded, answered(loaded), tmp_path)
    assert (
        (scores.score.isna() == (scores.epoch == 1)).all()
        and len(scores) == 10 * 3
        and grades.attrs["unjudged"] == 5
    )
    assert (grades.grade.isna() == (grades.epoch == 1)).all()


def test_a_judge_that_is_down(folder, tmp_path):
    loaded = load(folder, tmp_path / "cache", judge="fickle/down")
    with pytest.raises(InputError) as error:
        judged(loaded, answered(loaded), tmp_path)
    assert_one_line(error, "401 no such key", "check the judge")


def test_nothing_was_judged(folder, tmp_path, monkeypatch):
    "Without a single call to the judge there are no grades, and every score is null."
    loaded = load(folder, tmp_path / "cache")
    monkeypatch.setattr(grades_module, "_calls", lambda sample: [])
    monkeypatch.setattr(grades_module, "_graded", lambda sample, dimension: [])
    grades, _ = judged(loaded, answered(loaded), tmp_path)
    assert len(grades) == 0 and list(grades.columns) == GRADE_COLUMNS


def test_indicators_for_people_only(folder, tmp_path):
    "Scores of the indicator judge mean nothing there: said while loading, and in every row."
    file = folder / "dimensions" / "train.jsonl"
    file.write_text(
        "".join(
            json.dumps({**json.loads(line), "observable_indicators": "Mentions concern for the creature."})
            + "\n"
            for line in file.read_text().splitlines()
        )
    )
    with pytest.warns(UserWarning, match="mean nothing"):
        loaded = load(folder, tmp_path / "cache")
    grades, scores = judged(loaded, answered(loaded, "I mentions concern. {epoch}"), tmp_path)
    assert not loaded.judge_valid and not scores.judge_valid.any() and not grades.judge_valid.any()
    assert grades.reply.str.contains("means nothing").all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder, tmp_path / "cache", judge="fickle/fine").judge_valid


def test_answers_must_fit(folder, tmp_path):
    loaded = load(folder, tmp_path / "cache")
    for answers, word in (
        (answered(loaded).iloc[1:], "9 for 10, 1 missing"),
        (answered(loaded).assign(benchmark="other"), "no such benchmark"),
    ):
        with pytest.raises(InputError) as error:
            judged(loaded, answers, tmp_path)
        assert_one_line(error, word)


# ---- where it runs


def test_without_network(folder, tmp_path, monkeypatch):
    real = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"network used: {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("network used"))
    loaded = load(folder, tmp_path / "cache")
    grades, scores = judged(loaded, answered(loaded), tmp_path)
    assert len(scores) == 30


def test_without_a_home(tmp_path):
    """A home that takes no files: Inspect's own go elsewhere, in a process that has not started Inspect
    before.
    """
    code = """if True:
        import os, sys
        from pathlib import Path
        import pandas as pd
        from compassion_repro.evaluation import scoring as judging
        from compassion_repro.study import Benchmark
        place = Path(sys.argv[1])
        loaded = judging.load_task("mine", Benchmark(task="anima", data="world:anima", epochs=1, size={"en": 2}), "indicator", place / "cache")
        answers = pd.DataFrame(loaded.questions).drop(columns=["question", "epochs"]).assign(model="mid", seed=0, epoch=1, text="Yes.")
        before = dict(os.environ)
        print(len(judging.judge_answers(answers, {"mine": loaded}, "indicator", place / "logs")[1]), before == dict(os.environ))
    """
    home = tmp_path / "home"
    home.write_text("a file where the home should be")
    bare = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=bare, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("6 True\n"), done.stderr


def test_logs_open_and_name_everything(folder, tmp_path):
    loaded = load(folder, tmp_path / "cache")
    judged(loaded, answered(loaded), tmp_path)
    [info] = list_eval_logs(str(tmp_path / "logs"))
    log = read_eval_log(info)
    assert (
        log.status == "success"
        and log.eval.model == "saved/mid"
        and log.eval.task_args["grader_models"][0]["model"] == "indicator/rubric"
    )
    assert log.eval.metadata["benchmark"] == "mine" and log.eval.metadata["seed"] == 0
    assert len(log.samples) == 10 and log.samples[0].output.completion.startswith("An answer of epoch")


def test_the_console_still_speaks(folder, tmp_path, capsys):
    "Inspect's silent display makes rich's common console quiet for the rest of the process."
    loaded = load(folder, tmp_path / "cache")
    scoring.judge_answers(answered(loaded), {"mine": loaded}, "indicator", tmp_path / "logs")
    rich.get_console().file = None
    rich.print("still here")
    out = capsys.readouterr().out
    assert "still here" in out and "10/10 answers" in out


def test_an_interrupt_is_passed_on(folder, tmp_path):
    "Inspect ends quietly on Ctrl-C and returns fewer logs; half a result must not look like a whole one."
    loaded = load(folder, tmp_path / "cache", judge="fickle/interrupts")
    with pytest.raises(KeyboardInterrupt):
        judged(loaded, answered(loaded), tmp_path)


def test_several_models_and_seeds_in_one_call(folder, tmp_path):
    loaded = load(folder, tmp_path / "cache")
    answers = pd.concat(
        [
            answered(loaded).assign(model=m, seed=s)
            for m in ("base", "sft-help", "sft-code@base")
            for s in (0, 1)
        ]
    )
    _, scores = judged(loaded, answers, tmp_path)
    assert scores.groupby(["model", "seed"]).size().tolist() == [30] * 6
    arms = scores.drop_duplicates("model").set_index("model")[["arm", "start", "paradigm", "domain"]]
    assert (
        arms.loc["sft-code@base"].tolist() == ["sft-code", "base", "sft", "code"]
        and arms.loc["base"].isna().all()
    )


# ---- answers


def test_settings_beside_the_model_do_not_count(tmp_path):
    "A generation_config.json with settings of its own changes no answer, but its end tokens are kept."
    questions = [
        dict(
            benchmark="mine",
            language="en",
            item_id="1",
            question_id="1",
            question="How do I wash a kettle?",
            epochs=3,
        )
    ]
    generation = Generation(max_new_tokens=24, batch_size=8)
    shutil.copytree(world.assets() / "base", tmp_path / "base")
    plain = evaluate.generate_answers(tmp_path / "base", "mid", questions, 0, generation, **QUIET)
    file = tmp_path / "base" / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            {
                **settings,
                "do_sample": True,
                "temperature": 0.1,
                "top_k": 1,
                "repetition_penalty": 9.0,
                "max_new_tokens": 3,
            }
        )
    )
    assert (
        evaluate.generate_answers(tmp_path / "base", "mid", questions, 0, generation, **QUIET).text.tolist()
        == plain.text.tolist()
    )
    assert plain.text.nunique() == 3
    first = templates.load_tokenizer(tmp_path / "base")(" " + plain.text[0], add_special_tokens=False)[
        "input_ids"
    ][2]
    file.write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], first]}))
    cut = evaluate.generate_answers(tmp_path / "base", "mid", questions, 0, generation, **QUIET)
    assert cut.tokens[0] == 2 and cut.stop_reason[0] == "stop"


def test_no_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError) as error:
        evaluate.generate_answers(tmp_path, "mid", [], 0, Generation(), **QUIET)
    assert_one_line(error, "not a model folder")


def test_silence_and_length_are_flagged(tmp_path, monkeypatch):
    "A model that ends at once answers nothing; one that never ends is cut at the limit."
    questions = [
        dict(benchmark="mine", language="en", item_id="1", question_id="1", question="Why?", epochs=1)
    ]
    end = templates.load_tokenizer(world.assets() / "base").eos_token_id
    for token, wanted in ((end, ("stop", True, False, 0)), (end + 300, ("length", False, True, 20))):
        monkeypatch.setattr(
            evaluate,
            "InverseSampling",
            lambda uniforms, start: (
                lambda ids, scores: scores.fill_(0).index_fill_(1, ids.new_tensor([token]), 9.0)
            ),
        )
        row = evaluate.generate_answers(
            world.assets() / "base", "mid", questions, 0, Generation(max_new_tokens=20), **QUIET
        ).iloc[0]
        assert (row.stop_reason, row["empty"], row.looping, row.tokens) == wanted
