"""Judging as its own step: paid once, resumable, with unreliable judges and models; several judges, people,
and the commands. The stubs stand for providers that cost money.
"""

import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import anyio
import pandas as pd
import pytest
import tenacity
import yaml
from conftest import FORKS
from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.scorer import Score, mean_score

from compassion_repro import cli
from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.evaluation import agreement, benchmarks, indicators, judges, outcome_judge, scoring
from compassion_repro.pipeline import evaluate, evaluation_setup, judging, plan, preflight, run, stages
from compassion_repro.presets import load_preset
from compassion_repro.report import tables
from compassion_repro.stats.claims import read_claims
from compassion_repro.store import folder as store
from compassion_repro.store import graph
from compassion_repro.store.results import read_study_files
from compassion_repro.study import Generation

QUIET = {"say": lambda line: None, "report": lambda line: None}
CALLS, WORKING, HEARD = Counter(), {}, []


class Busy(Exception):
    "Too many requests."


@modelapi(name="paid")
class PaidJudge(ModelAPI):
    "A judge that costs money; its name says how it misbehaves, CALLS counts what it was asked."

    async def generate(self, input, tools, tool_choice, config):
        prompt = input[-1].text
        CALLS[self.model_name, prompt] += 1
        HEARD.append(self.model_name)
        if self.model_name == "busy" and CALLS[self.model_name, prompt] <= 2:
            raise Busy("429 too many requests")
        if self.model_name == "gone" or HEARD.count(self.model_name) > WORKING.get(self.model_name, 10**9):
            raise RuntimeError("404 model not found")
        if self.model_name == "slow":
            await anyio.sleep(60)
        text = {
            "nothing": "",
            "refuses": "I cannot help with that.",
            "one-dimension": "GRADE: C",
            "classes": "CLASS: REFUSES",
        }.get(self.model_name, "Well.\n\nGRADE: C")
        if (
            self.model_name == "one-dimension"
            and indicators.read_judge_prompt(prompt)["dimension"].lower() == "moral consideration"
        ):
            text = "I cannot say."
        output = ModelOutput.from_content(self.model_name, text)
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    def should_retry(self, ex):
        return isinstance(ex, Busy)

    def retry_wait(self):
        return tenacity.wait_none()


@modelapi(name="stub")
class StubModel(ModelAPI):
    "A hosted model that answers with nothing, or not at all."

    async def generate(self, input, tools, tool_choice, config):
        if self.model_name == "down":
            raise RuntimeError("503 down for good")
        return ModelOutput.from_content(self.model_name, "")


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def evaluated(
    out, models=("world:base", "mockllm/model"), bench=("tiny-anima", "tiny-moru"), judge="indicator", **more
):
    options = dict(generation=Generation(max_new_tokens=16, batch_size=32), epochs=2, limit=4) | QUIET | more
    return evaluate.evaluate_models(list(models), list(bench), judge, out, **options)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    "Two models' answers to both benchmarks, judged by the indicators."
    return evaluated(tmp_path_factory.mktemp("evaluated") / "out")


@pytest.fixture(scope="module")
def answered_by_one(tmp_path_factory):
    "One model's answers to one benchmark, judged by the indicators: enough where the judge is at fault."
    return evaluated(tmp_path_factory.mktemp("small") / "out", ["mockllm/model"], ["tiny-anima"])


def fresh_copy(study, to):
    "A copy; no stub has been asked anything yet."
    CALLS.clear()
    WORKING.clear()
    HEARD.clear()
    return Path(shutil.copytree(study, to))


@pytest.fixture
def folder(answered, tmp_path):
    "A copy of what two models answered to both benchmarks."
    return fresh_copy(answered, tmp_path / "out")


@pytest.fixture
def small(answered_by_one, tmp_path):
    "A copy of what one model answered to one benchmark."
    return fresh_copy(answered_by_one, tmp_path / "out")


def prompts_of(folder):
    "Every different prompt that the official scorers make of the folder's answers."
    tasks = evaluation_setup.load_setup(
        evaluation_setup.setup_of(folder), folder / "benchmarks", scoring.listener()
    )
    return set(scoring.judge_prompts(pd.read_parquet(folder / "answers.parquet"), tasks).prompt)


def judge(folder, name, **more):
    return judging.judge_folder(folder, name, **{"yes": True, **QUIET, **more})


def scores(folder, judge=None):
    table = pd.read_parquet(folder / "scores.parquet")
    return table if judge is None else table[table.judge == judge]


# ---- never paid twice


def test_one_call_a_prompt_over_epochs_models_and_passes(folder):
    judge(folder, "paid/fine")
    assert set(prompt for _, prompt in CALLS) == prompts_of(folder) and set(CALLS.values()) == {1}
    grades = pd.read_parquet(folder / "grades.parquet").query("judge == 'paid/fine'")
    assert len(grades) > len(CALLS)  # equal answers of two epochs were graded by one reply
    assert (grades.grade == 1).all() and (scores(folder, "paid/fine").score == 1).all()
    before = dict(CALLS)
    judge(folder, "paid/fine")
    judge(folder, "paid/fine", again=True)
    assert dict(CALLS) == before
    judge(folder, "paid/fine", settings={"temperature": 0.5})  # another setting is another question
    assert set(CALLS.values()) == {2}


def test_what_is_asked_beforehand_is_what_is_paid(small, tmp_path):
    (tmp_path / "prices.yaml").write_text("paid/fine: {input: 2, output: 4}\n")
    with pytest.raises(InputError) as error:
        judge(small, "paid/fine", yes=False, prices=tmp_path / "prices.yaml")
    calls = len(prompts_of(small))
    assert_one_line(error, f"paid/fine: {calls} calls (0 stored already)", "about $", "--yes")
    with pytest.raises(InputError, match="no price in the table"):
        judge(small, "paid/unknown", yes=False)
    with pytest.raises(InputError, match="nothing spent"):
        judge(small, "paid/fine", yes=False, answer=lambda question: "n")
    assert not CALLS
    heard = []
    judge(small, "paid/fine", yes=False, answer=lambda question: "y", say=heard.append)
    assert len(CALLS) == calls and heard[0].startswith(f"paid/fine: {calls} calls")
    judge(small, "paid/fine", yes=False, again=True)  # nothing is left to pay for, so nothing is asked


def test_a_judge_that_dies_half_way(folder):
    calls = len(prompts_of(folder))
    WORKING["mortal"] = calls // 2
    with pytest.raises(InputError) as error:
        judge(folder, "paid/mortal", settings={"max_connections": 4})
    assert_one_line(
        error,
        "paid/mortal",
        "stopped answering",
        "404 model not found",
        "replies so far are kept",
        "--substitute",
    )
    assert len(HEARD) <= calls // 2 + judges.GIVE_UP + 4  # it was not asked for all the rest
    assert scores(folder, "paid/mortal").empty
    answered_once = len(HEARD)
    WORKING.clear()
    judge(folder, "paid/mortal")
    assert len(HEARD) - answered_once == calls - calls // 2  # only what had no reply
    assert (scores(folder, "paid/mortal").score == 1).all()


CRASH = """if True:
    import os, sys
    from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi
    from compassion_repro.pipeline.judging import judge_folder
    folder, calls, last = sys.argv[1], sys.argv[2], int(sys.argv[3])

    @modelapi(name="paid")
    class Paid(ModelAPI):
        async def generate(self, input, tools, tool_choice, config):
            with open(calls, "a") as file: file.write("x")
            if os.path.getsize(calls) >= last: os._exit(9)
            output = ModelOutput.from_content("paid", "GRADE: C")
            output.usage = ModelUsage()
            return output

    judge_folder(folder, "paid/fine", settings={"max_connections": 1}, yes=True)
"""


def test_a_crash_loses_only_the_call_under_way(folder, tmp_path):
    calls, wanted = tmp_path / "calls", len(prompts_of(folder))

    assert FORKS.start(CRASH, [str(folder), str(calls), "10"]).wait() == 9 and calls.stat().st_size == 10
    assert scores(folder, "paid/fine").empty
    judge(folder, "paid/fine")  # another process goes on from the replies that were kept
    assert len(HEARD) == wanted - 9 and set(CALLS.values()) == {1}


def test_busy_judges_are_waited_for(small):
    judge(small, "paid/busy")
    assert set(CALLS.values()) == {3} and (scores(small, "paid/busy").score == 1).all()


def test_impatience_has_an_end(folder):
    with pytest.raises(InputError) as error:
        judge(folder, "paid/busy", settings={"max_retries": 1})
    assert_one_line(error, "again and again", "429 too many requests", "wait, and run the same command again")


# ---- judges that do not do their work


def test_a_judge_that_is_gone_and_its_substitute(folder):
    with pytest.raises(InputError) as error:
        judge(folder, "paid/gone")
    assert_one_line(error, "paid/gone", "404 model not found")
    assert scores(folder, "paid/gone").empty
    heard = []
    judge(folder, "paid/gone", substitute="paid/fine", say=heard.append)
    rows = scores(folder, "paid/fine")
    assert (
        (rows.substitute_for == "paid/gone").all()
        and rows.score.notna().all()
        and scores(folder, "indicator").substitute_for.isna().all()
    )
    assert (
        pd.read_parquet(folder / "grades.parquet").query("judge == 'paid/fine'").substitute_for == "paid/gone"
    ).all()
    assert any("marked as a substitute" in line for line in heard)
    assert set(evaluate.summary(folder).query("judge == 'paid/fine'").substitute_for) == {"paid/gone"}
    with pytest.raises(InputError, match="is one of the judges"):
        judge(folder, "paid/gone", substitute="paid/gone")


def test_a_judge_that_times_out(small):
    with pytest.raises(InputError) as error:
        judge(small, "paid/slow", settings={"attempt_timeout": 1, "max_retries": 0, "max_connections": 200})
    assert_one_line(error, "judging", "again and again", "wait, and run the same command again")


@pytest.mark.parametrize("name, stored, empty", [("nothing", False, True), ("refuses", True, False)])
def test_replies_without_a_grade(small, name, stored, empty):
    judge(small, f"paid/{name}")
    rows, calls = scores(small, f"paid/{name}"), len(prompts_of(small))
    assert len(rows) and rows.score.isna().all()
    grades = pd.read_parquet(small / "grades.parquet").query(f"judge == 'paid/{name}' and attempted")
    assert grades.grade.isna().all() and grades.model.nunique() == 1
    assert ((grades.reply.fillna("").str.strip() == "") == empty).all()
    asked = len(HEARD)
    judge(small, f"paid/{name}", again=True)
    assert len(HEARD) == (asked if stored else 2 * asked) and asked >= calls
    if name == "nothing":
        with pytest.raises(InputError, match="answers with nothing"):
            judges.try_judge("paid/nothing")
    else:
        assert judges.try_judge("paid/refuses") == "I cannot help with that."


@pytest.mark.parametrize(
    "name, words",
    [
        ("paid/gone", ("does not answer", "404")),
        ("nobody/model", ("nobody/model",)),
        ("./nowhere", ("not there",)),
    ],
)
def test_trying_a_judge(name, words):
    with pytest.raises(InputError) as error:
        judges.try_judge(name)
    assert_one_line(error, *words)


def test_a_local_judge_needs_no_key(tmp_path, monkeypatch):
    CALLS.clear()
    folder = evaluated(tmp_path / "out", ["mockllm/model"], ["tiny-anima"], limit=1, epochs=1)
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    place = world.assets() / "base"
    heard = []
    judge(folder, str(place), yes=False, settings={"max_tokens": 4, "temperature": 0}, say=heard.append)
    rows = pd.read_parquet(folder / "grades.parquet").query("judge == @place.as_posix()")
    assert (
        rows.reply.str.len().gt(0).any()
        and rows.grade.isna().all()
        and not any("calls" in line for line in heard)
    )


# ---- the two upstream faults


def test_upstream_explanation_of_a_dimension_that_never_parsed(folder, monkeypatch):
    "Upstream, ANIMA fails where one dimension got no grade; here the others are kept."
    judge(folder, "paid/one-dimension")
    muted = scores(folder, "paid/one-dimension").query(
        "benchmark == 'anima' and dimension == 'Moral Consideration'"
    )
    assert len(muted) and muted.score.isna().all()
    monkeypatch.setattr(scoring, "_graded_only", lambda arguments: arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        judge(folder, "paid/one-dimension", again=True)
    assert any(
        "Moral Consideration" in str(w.message) and "could not be judged" in str(w.message) for w in told
    )
    assert (
        "unjudged_in"
        in (folder / "judges" / evaluation_setup.slug("paid/one-dimension") / "pass.json").read_text()
    )
    monkeypatch.undo()
    judge(folder, "paid/one-dimension")  # what failed is judged again, and only that
    assert scores(folder, "paid/one-dimension").query("dimension == 'overall'").score.notna().all() and set(
        CALLS.values()
    ) == {1}


def test_upstream_mean_of_dimensions_that_differ(tmp_path):
    """Upstream, epochs graded on different dimensions end the run; the reducer here takes each dimension's
    own mean.
    """
    differing = [Score(value={"overall": 1.0}), Score(value={"overall": 0.0, "care": 0.5})]
    with pytest.raises(Exception):
        mean_score()(list(reversed(differing)))
    assert scoring.mean_where_graded()(differing).value == {"overall": 0.5, "care": 0.5}


# ---- models and answers


def test_a_model_that_says_nothing(tmp_path):
    heard = []
    out = evaluated(tmp_path / "mute", ["stub/mute"], ["tiny-anima"], say=heard.append)
    answers = pd.read_parquet(out / "answers.parquet")
    assert answers["empty"].all() and (answers.text == "").all() and (scores(out).score == 0).all()
    assert any("100% are empty" in line for line in heard)
    assert evaluate.summary(out)["empty"].tolist() == [100.0]


def test_a_model_that_is_down(tmp_path):
    with pytest.raises(InputError) as error:
        evaluated(tmp_path / "down", ["stub/down"], ["tiny-anima"])
    assert_one_line(error, "stub/down", "stopped answering anima", "503", "same command again")


def test_answers_that_do_not_fit(folder):
    file = next(folder.glob("answers/mockllm*/anima.parquet"))
    pd.read_parquet(file).iloc[1:].to_parquet(file)
    (folder / "record.json").unlink()
    with pytest.raises(InputError) as error:
        judge(folder, "strict")
    assert_one_line(error, "do not fit the benchmark (7 for 8, 1 missing)")
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError) as error:
        judge(folder, "strict")
    assert_one_line(error, "damaged", "run the same command again")


def test_a_folder_belongs_to_one_setup(small, tmp_path):
    for more, word in (
        (dict(seed=2), "seed: 1 there, 2 here"),
        (dict(limit=3), "limit"),
        (dict(generation=Generation(max_new_tokens=9)), "generation"),
    ):
        with pytest.raises(InputError) as error:
            evaluated(small, **more)
        assert_one_line(error, "made otherwise", word, "another --out")
    (small / "eval.yaml").write_text("benchmarks: 5\n")
    with pytest.raises(InputError, match="cannot be read"):
        evaluated(small)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no evaluation"):
        evaluated(tmp_path / "full")


def test_more_models_and_benchmarks_extend_a_folder(folder):
    "An adapter folder on its base, and a task that scores itself; what was there is not made again."
    (folder.parent / "tasks.py").write_text("""
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import choice
from inspect_ai.solver import multiple_choice

@task
def sums(): return Task(dataset=[Sample(input=f"{i} + {i}?", choices=["2", "4"], target="AB"[i - 1]) for i in (1, 2)], solver=multiple_choice(), scorer=choice())
""")
    from peft import LoraConfig, get_peft_model

    from compassion_repro.training.models import load_model

    get_peft_model(
        load_model(world.assets() / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).save_pretrained(folder.parent / "adapter")
    settings = folder.parent / "adapter" / "adapter_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "world:base"})
    )
    before = {p: p.stat().st_mtime_ns for p in folder.glob("answers/*/*.parquet")}
    models = ["world:base", str(folder.parent / "adapter")]
    evaluated(folder, models, ["tiny-anima", "tiny-moru", f"{folder.parent}/tasks.py@sums"])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    table = evaluate.summary(folder)
    assert set(table.model) == {*models, "mockllm/model"} and set(table[table.benchmark == "sums"].judge) == {
        "task"
    }
    assert len(scores(folder, "task")) == 2 * 2 * 2 and set(scores(folder, "task").score) <= {0.0, 1.0}
    get_peft_model(
        load_model(world.assets() / "base"),
        LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).save_pretrained(folder.parent / "adapter")
    with pytest.raises(InputError) as error:
        evaluated(folder, models)
    assert_one_line(error, "weights of", "another --out")


@pytest.mark.parametrize("folder_name", ["tiny-anima", "data"])
def test_every_kind_of_name_leads_to_the_same_lines(tmp_path, folder_name):
    if folder_name == "data":
        place = world.write_benchmark("anima", tmp_path / "data", {"en": 3, "es": 2})
        out = evaluated(
            tmp_path / "out", ["mockllm/model"], [f"ahb={place}"], languages=["Spanish"], limit=None
        )
        assert set(pd.read_parquet(out / "answers.parquet").language) == {"es"} and set(
            scores(out).benchmark
        ) == {"anima"}
    else:
        for word, official in (("ahb", "anima"), ("moru", "moru")):
            name, section = benchmarks.named_benchmark(word)
            assert name == official and section.data.partition("@")[2] and section.epochs == 5
    with pytest.raises(InputError) as error:
        evaluated(tmp_path / "no", ["mockllm/model"], ["tiny-anima"], languages=["es", "xx"])
    assert_one_line(error, "no questions in 'xx'", "en, es, ms")


def test_a_task_of_the_collection_by_its_name(monkeypatch, tmp_path):
    "`--bench hellaswag` finds the task; where its data cannot be had, that is one line."
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError) as error:
        benchmarks.load_named_task("hellaswag")
    assert_one_line(error, "hellaswag", "cannot be loaded", "no network here")


# ---- several judges, and people


def test_several_judges_agree_or_not(folder):
    judge(folder, "strict")
    grades = pd.read_parquet(folder / "grades.parquet")
    table = agreement.agreement(grades, resamples=200)
    assert (
        set(table.benchmark) == {"anima", "moru"}
        and "all" in set(table.dimension)
        and (table.raw <= 1).all()
        and set(table.judges) == {"indicator, strict"}
    )
    both = grades.pivot_table(index=agreement.UNIT, columns="judge", values="grade")
    assert (both.strict <= both.indicator).all()


def test_a_preset_with_two_judges(study_copy, tmp_path):
    "One stage, a pass a judge."
    study = store.Study(study_copy)
    preset = study.preset.model_copy(update={"judge": "indicator,strict"})
    stage = next(s for s in graph.graph(preset) if s.id == "eval-mid")
    (tmp_path / "stage").mkdir()
    done = stages.RUN["eval"](
        stages.StageContext(preset, stage, study, tmp_path / "stage", lambda line: None)
    )
    rows = pd.read_parquet(tmp_path / "stage" / "scores.parquet")
    assert (
        done["judge"] == "indicator,strict"
        and rows.judge.value_counts().nunique() == 1
        and set(rows.judge) == {"indicator", "strict"}
    )


def test_a_study_is_judged_again_and_keeps_it(study_copy, capsys, no_pictures):
    assert cli.main(["judge", str(study_copy), "--judge", "strict"]) == 0
    out = capsys.readouterr().out
    assert "strict" in out and "Krippendorff's alpha" in out
    table = scores(study_copy)
    assert (
        table.judge.value_counts().nunique() == 1
        and set(table.judge) == {"indicator", "strict"}
        and not table.duplicated(
            ["judge", "model", "seed", "benchmark", "question_id", "epoch", "dimension"]
        ).any()
    )
    assert {record.judge for record in read_claims(study_copy / "claims.json").records} == {
        "indicator",
        "strict",
        "no judge",
        "mean of judges",
    }
    study = store.Study(study_copy)
    run.collect(study, study.finished(study.preset))  # what `run` does when nothing is left to run
    assert len(scores(study_copy)) == len(table)


def test_a_preset_names_the_model_that_classes_the_answers(study_copy, capsys, no_pictures):
    CALLS.clear()
    HEARD.clear()
    study, answers = store.Study(study_copy), pd.read_parquet(study_copy / "answers.parquet")
    words = ["run", "--out", str(study_copy), "--set", "outcomes=paid/classes"]
    assert cli.main(words) == 2 and not HEARD  # no terminal to ask at, and no --yes
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"paid/classes: {len(answers):,} calls" in err and "add --yes" in err
    prompts = len(set(outcome_judge.class_prompts(answers)))
    WORKING["classes"] = 5
    assert (
        cli.main([*words, "--yes"]) == 2 and "judge 'paid/classes' does not answer" in capsys.readouterr().err
    )
    WORKING.clear()
    HEARD.clear()
    assert cli.main([*words, "--yes"]) == 0 and len(HEARD) == prompts - 5  # those five are paid for
    out = capsys.readouterr().out
    assert " 0 to run" in out and f"paid/classes: classed {len(answers):,} answers" in out
    table = tables.outcome_table(read_study_files(study_copy))
    assert set(table["refuses, %"]) == {"100.0"} and set(table["classed by"]) == {"paid/classes"}
    planned = plan.plan(study.preset)
    assert sum(record["outcome_calls"] or 0 for record in planned) == len(answers)
    assert cli.main(["judge", str(study_copy), "--outcomes", "paid/classes"]) == 0
    assert "nothing to class" in capsys.readouterr().out
    (study_copy / "forms.parquet").write_bytes(b"cut short")
    assert cli.main(["run", "--out", str(study_copy), "--yes"]) == 0  # the study has the setting now
    assert "classed by" in tables.outcome_table(read_study_files(study_copy))
    assert len(HEARD) == prompts - 5


@pytest.mark.parametrize(
    "outcomes, line",
    [
        ("nosuch/model", "nosuch"),
        ("./nowhere", "is a folder that is not there"),
        ("openai/gpt-4o-mini", "OPENAI_API_KEY"),
    ],
)
def test_who_classes_is_opened_before_training(outcomes, line, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    preset = load_preset("smoke", [f"outcomes={outcomes}"])
    with pytest.raises(InputError) as error:
        run.run(preset, tmp_path / "study", say=lambda line: None)
    assert_one_line(error, outcomes, line)
    assert not list(tmp_path.glob("study/seed-*/*"))
    looked = preflight.preflight(preset, tmp_path / "plan", lambda line: None, fetch=False)
    found = [*looked.lacks, *looked.problems]
    assert line in found[0]


def test_people_grade_a_study(study_copy, tmp_path, capsys):
    sheet = tmp_path / "sheet.csv"
    assert cli.main(["annotate", str(study_copy), "--sample", "20", "--out", str(sheet)]) == 0
    rows = pd.read_csv(sheet, dtype=str)
    assert (
        len(rows) == 20
        and set(rows.columns)
        == {"id", "question", "answer", "dimension", "guiding_question", "indicators", "grade"}
        and rows.grade.isna().all()
    )
    for model in store.Study(study_copy).preset.models_compared:
        assert not rows.drop(columns="answer").eq(model).any().any()
    rows.assign(grade="1").sort_values("answer").to_csv(sheet, index=False)
    capsys.readouterr()
    assert cli.main(["annotate", str(study_copy), "--read", str(sheet)]) == 0
    assert "indicator, human" in capsys.readouterr().out
    human = pd.read_parquet(study_copy / "grades.parquet").query("judge == 'human'")
    assert len(human) == 20 and (human.grade == 1).all() and "human" not in set(scores(study_copy).judge)
    key = sheet.with_name("sheet.key.csv")
    key.write_text(
        key.read_text().replace("anima", "other").replace("moru", "other").replace("leak", "other")
    )
    assert cli.main(["annotate", str(study_copy), "--read", str(sheet)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the commands


def test_the_commands_end_to_end(tmp_path, capsys):
    words = [
        "eval",
        "mockllm/model",
        "--bench",
        "tiny-anima",
        "--judge",
        "paid/fine",
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "2",
        "--epochs",
        "1",
        "--max-tokens",
        "16",
        "--languages",
        "en",
    ]
    CALLS.clear()
    assert cli.main(words) == 2 and not CALLS  # no terminal to ask at, and no --yes
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "add --yes" in err
    assert cli.main([*words, "--yes", "--judge-temperature", "0"]) == 0 and CALLS
    assert "100.0" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out" / "eval.yaml").read_text())["limit"] == 2
    for wrong, word in (
        (["judge", str(tmp_path), "--judge", "strict"], "neither a study nor an evaluation"),
        (["judge", str(tmp_path / "out"), "--judge", "gemini"], "neither 'indicator'"),
        (
            [
                "eval",
                "mockllm/model",
                "--bench",
                "nonesuch",
                "--judge",
                "strict",
                "--out",
                str(tmp_path / "x"),
            ],
            "unknown benchmark",
        ),
        (["eval", "mockllm/model", "--judge", "strict", "--out", "x", "--limit", "0"], "--limit"),
        (["annotate", str(tmp_path / "out")], "--out sheet.csv"),
        (["doctor", "--judge", "paid/gone"], "404"),
    ):
        assert cli.main(wrong) == 2, wrong
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word in err, err
    assert cli.main(["doctor", "--judge", "strict"]) == 0 and "GRADE: C" in capsys.readouterr().out
