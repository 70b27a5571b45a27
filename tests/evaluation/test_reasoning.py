"""A task that needs no judge as a benchmark of a study: claim C8 gets a verdict of its own kind, from scores
by the task's own rules.
"""

import json

import pytest
from conftest import CRASH_SIZE

from compassion_repro.core.errors import InputError
from compassion_repro.pipeline import run
from compassion_repro.presets import load_preset
from compassion_repro.store.graph import graph
from compassion_repro.store.results import read_study_files

SUMS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, mean, scorer
from inspect_ai.solver import generate, system_message

@scorer(metrics=[mean()])
def long_enough():
    async def score(state, target): return Score(value=1.0 if len(state.output.completion.split()) >= int(target.text) else 0.0)
    return score

@task
def words(): return Task(dataset=[Sample(input=f"Say {i} words.", target=str(i)) for i in range(1, 9)], solver=[system_message("Be brief."), generate()], scorer=long_enough())
"""


@pytest.mark.long
def test_a_study_reads_c8_on_a_task_of_its_own(tmp_path):
    (tmp_path / "tasks.py").write_text(SUMS)
    preset = load_preset(
        "smoke",
        [
            *CRASH_SIZE,
            "arms=[sft-code]",
            "models.given={mid: world:base, sft-code: world:base}",
            "benchmarks.anima.size={en: 2}",
            "benchmarks.moru.size={en: 2}",
            "judge=indicator,strict",
            f"benchmarks.words={{task: {tmp_path / 'tasks.py'}@words, epochs: 2, limit: 6}}",
        ],
    )
    study = run.run(preset, tmp_path / "study", say=lambda line: None, page=False)
    answers, scores = study.table("answers"), study.table("scores")
    asked = answers[answers.benchmark == "words"]
    assert len(asked) == 3 * 6 * 2 and asked.prompt.str.contains("Be brief.").all()
    own = scores[scores.benchmark == "words"]
    assert (
        set(own.judge) == {"task"}
        and len(own) == len(asked)
        and set(scores.judge) == {"indicator", "strict", "task"}
    )
    joined = own.merge(asked, on=["model", "question_id", "epoch"])
    assert (joined.score == (joined.text.str.split().str.len() >= joined.question_id.astype(int))).all()
    records = {(r["reading"], r["judge"]): r for r in json.loads((study.folder / "claims.json").read_text())}
    for judge in ("indicator", "strict", "mean of judges"):
        record = records["C8-SFT-words", judge]
        assert (
            record["kind"] == "non-inferiority"
            and record["estimate"] is not None
            and record["verdict"] != "not tested"
            and record["questions"] == 6
        )
    assert {judge for _, judge in records} == {"indicator", "strict", "mean of judges", "no judge"}
    assert records["C8-GRPO-words", "strict"]["verdict"] == "not tested"
    files = read_study_files(study.folder)  # what figures and report are drawn from
    assert files.judges == ["indicator", "strict"] and "words" in set(files.lead.benchmark)


def test_only_studies_that_ask_for_it_get_other_keys(tmp_path):
    (tmp_path / "tasks.py").write_text(SUMS)

    def keys(*words):
        return {s.id: s.key for s in graph(load_preset("smoke", words))}

    task = f"benchmarks.words={{task: {tmp_path / 'tasks.py'}@words, epochs: 1}}"
    before, after = keys(), keys(task)
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith(("answers-", "eval-", "probe-"))
    }
    (tmp_path / "tasks.py").write_text(SUMS.replace("Be brief.", "Be short."))
    assert keys(task)["answers-mid"] != after["answers-mid"] and keys(task)["mid"] == after["mid"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["benchmarks.anima.task=hellaswag"], "brings its own questions"),
        (["benchmarks.logic={task: anima}"], "set data"),
        (["benchmarks.logic={task: a task}"], "the name of a task"),
    ],
)
def test_a_benchmark_that_is_half_one_thing(words, said):
    with pytest.raises(InputError) as error:
        load_preset("smoke", words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_task_is_told_before_any_training(tmp_path):
    with pytest.raises(InputError, match="unknown benchmark 'no_such_task'"):
        run.run(
            load_preset("smoke", ["benchmarks.logic={task: no_such_task}"]),
            tmp_path / "study",
            say=lambda line: None,
        )
    assert not list(tmp_path.glob("study/seed-*/*"))
