"""The study from end to end at crash-test size: what it leaves on disk, that it repeats, resumes and extends."""

import json
import shutil
import signal
import time

import pandas as pd
import pytest
from conftest import assert_one_line, run_study, start_study

from compassion_repro.presets import load_preset
from compassion_repro.stats.claims import read_claims
from compassion_repro.store.folder import Study
from compassion_repro.store.graph import graph

MODELS = ["base", "mid", "sft-help", "sft-code", "sft-help@base", "sft-code@base"]
ANSWERS = {
    "model",
    "seed",
    "benchmark",
    "language",
    "item_id",
    "question_id",
    "cluster",
    "epoch",
    "text",
    "tokens",
    "stop_reason",
    "empty",
    "looping",
}
GRADES = {
    "model",
    "seed",
    "benchmark",
    "language",
    "item_id",
    "question_id",
    "epoch",
    "dimension",
    "variables",
    "judge",
    "judge_settings",
    "grade",
    "attempted",
    "reply",
}
SCORES = {
    "study",
    "model",
    "arm",
    "start",
    "paradigm",
    "domain",
    "seed",
    "benchmark",
    "language",
    "item_id",
    "question_id",
    "epoch",
    "dimension",
    "cluster",
    "score",
    "judge",
}


def table(study, name):
    return pd.read_parquet(study / f"{name}.parquet")


def same_scores(one, other):
    "Whether two studies hold the same scores, bit for bit; the study's own name aside."
    a, b = (table(s, "scores").drop(columns="study").reset_index(drop=True) for s in (one, other))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    return True


def test_what_a_study_leaves_on_disk(finished):
    for name, columns in (("answers", ANSWERS), ("grades", GRADES), ("scores", SCORES)):
        assert columns <= set(table(finished, name)), name
    for name in ("study.yaml", "claims.json", "figures/scores.png", "figures/scores.svg"):
        assert (finished / name).stat().st_size > 0, name
    for model in MODELS:
        place = finished / "seed-1" / model
        assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= {
            p.name for p in place.iterdir()
        }
        if model != "base":
            assert (place / "rows.jsonl").stat().st_size > 0
    assert not list(finished.rglob("*.partial*"))
    assert sorted(table(finished, "scores").model.unique()) == sorted(MODELS)


def test_answers_are_complete_and_epochs_count_from_one(finished):
    answers = table(finished, "answers")
    counts = answers.groupby(["model", "benchmark"]).size().unstack()
    assert (counts == pd.Series({"anima": 14, "leak": 4, "moru": 14})).all().all()
    assert set(answers.epoch) == {1, 2} and answers.text.map(type).eq(str).all()


def test_translations_and_object_twins_share_their_items(finished):
    scores = table(finished, "scores").drop_duplicates(["benchmark", "question_id"])
    animals = scores[scores.benchmark == "anima"]
    assert len(animals) == 7 and animals.groupby("item_id").cluster.nunique().eq(1).all()
    assert sorted(animals.item_id) == ["0", "0", "0", "1", "1", "1", "2"]
    english = animals[animals.language == "en"].set_index("item_id").cluster
    objects = scores[scores.benchmark == "leak"].set_index("item_id").cluster
    assert sorted(objects.index) == ["0", "1"] and (objects == english[objects.index]).all()


def test_overall_is_the_tasks_own_aggregate_of_the_grades(finished):
    keys = ["model", "benchmark", "question_id", "epoch"]
    grades, scores = table(finished, "grades"), table(finished, "scores")
    dimensions = grades.groupby([*keys, "dimension"]).grade.mean()
    given = scores[scores.dimension != "overall"].set_index([*keys, "dimension"]).score
    pd.testing.assert_series_equal(dimensions.sort_index(), given.sort_index(), check_names=False)
    moru = scores[scores.benchmark == "moru"]  # MORU weighs its dimensions equally
    means = moru[moru.dimension != "overall"].groupby(keys).score.mean()
    pd.testing.assert_series_equal(
        means.sort_index(),
        moru[moru.dimension == "overall"].set_index(keys).score.sort_index(),
        check_names=False,
    )


def test_the_claim_table_is_printed_and_kept(finished):
    printed, records = (
        (finished.parent / "stdout.txt").read_text(),
        json.loads((finished / "claims.json").read_text()),
    )
    assert "C0" in printed and "miniature world" in printed
    verdicts = {r["reading"]: r["verdict"] for r in records}
    assert verdicts["C2"] == "not tested" and verdicts["C1"] != "not tested"
    assert all("miniature world" in r["scope"] for r in records)
    assert {r["judge"] for r in records} == {"indicator", "no judge"}  # the second: readings on pairs


def test_manifests_say_what_was_done(finished):
    manifests = {m["stage"]: m for m in Study(finished).manifests()}
    assert len(manifests) == 24
    for model in MODELS[1:]:
        result = manifests[model]["result"]
        assert {
            "rows",
            "steps",
            "tokens",
            "loss_tokens",
            "loss_before",
            "loss_after",
            "trained",
            "merge",
        } <= set(result)
        assert result["rows"] == sum(1 for _ in (finished / "seed-1" / model / "rows.jsonl").open())
    steps = {manifests[m]["result"]["steps"] for m in MODELS[2:]}
    assert len(steps) == 1  # equal dose
    assert manifests["mid"]["packages"]["torch"] and manifests["mid"]["peak_memory_mb"] > 0


def test_saved_models_open_with_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for model in ("base", "mid", "sft-code"):
        opened, tokenizer = (
            AutoModelForCausalLM.from_pretrained(finished / "seed-1" / model),
            AutoTokenizer.from_pretrained(finished / "seed-1" / model),
        )
        assert opened.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_second_run_has_nothing_to_do(study_copy):
    before = {p: p.stat().st_mtime_ns for p in study_copy.rglob("manifest.json")}
    done = run_study(study_copy, words=("--json",))
    assert done.returncode == 0 and "24 done, 0 to run" in done.stderr
    record = json.loads(done.stdout)
    assert record["claims"] == json.loads((study_copy / "claims.json").read_text(encoding="utf-8"))
    assert record["study"] == str(study_copy) and record["report"] is None and len(record["answer"]) == 3
    assert before == {p: p.stat().st_mtime_ns for p in study_copy.rglob("manifest.json")}


@pytest.mark.long
def test_more_seeds_extend_a_study(tmp_path):
    small = ("arms=[sft-help]", "benchmarks.moru=null", "benchmarks.leak=null")
    assert run_study(tmp_path / "study", *small).returncode == 0
    first = table(tmp_path / "study", "scores")
    done = run_study(tmp_path / "study", *small, words=("--seeds", "2"))
    assert done.returncode == 0 and "12 done, 12 to run" in done.stdout, done.stderr[-2000:]
    scores = table(tmp_path / "study", "scores")
    assert set(scores.seed) == {1, 2}
    pd.testing.assert_frame_equal(
        scores[scores.seed == 1].reset_index(drop=True), first.reset_index(drop=True), check_exact=True
    )


@pytest.mark.long
def test_a_study_without_a_benchmark_gets_verdicts(tmp_path):
    done = run_study(
        tmp_path / "study", "benchmarks={}", "margin.pairs=[written, spanish, matched]", report=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    study = Study(tmp_path / "study")
    kinds = {manifest["kind"] for manifest in study.manifests()}
    assert kinds == {"base", "midtrain", "sft", "probe"}
    assert not [name for name in ("answers", "scores") if (study.folder / f"{name}.parquet").exists()]
    claims = read_claims(study.folder / "claims.json")
    assert {record.judge for record in claims.records} == {"no judge"} and claims.judges == []
    tested = {record.reading for record in claims.records if record.estimate is not None}
    named = ("C0-SFT", "C1", "C5a", "C5b", "C6-SFT")
    assert {f"{name}-pairs" for name in named} <= tested and "C1-matched" in tested
    assert "; no judge." in (study.folder / "report.html").read_text(encoding="utf-8")
    assert (study.folder / "figures" / "claims.png").exists()


def test_another_judge_would_keep_the_answers(finished):
    preset = Study(finished).preset
    other = preset.model_copy(update={"judge": "another/judge"})
    pending = [s.id for s in graph(other) if not Study(finished).done(s)]
    assert pending and all(s.startswith("eval-") for s in pending)


def test_another_configuration_is_refused_with_the_difference(study_copy):
    done = run_study(study_copy, "sft.learning_rate=0.001")
    assert_one_line(
        done, "belongs to another configuration", "sft.learning_rate: 0.0003 there, 0.001 here", "--out"
    )


STRUCK = [(signal.SIGINT, "mid"), (signal.SIGKILL, "mid")]
FURTHER = [(signal.SIGINT, stage) for stage in ("base", "sft-help", "answers-mid", "eval-mid")]
FURTHER += [(signal.SIGKILL, "eval-mid")]
STRUCK += [pytest.param(*pair, marks=pytest.mark.long) for pair in FURTHER]


@pytest.mark.parametrize("how, stage", STRUCK)
def test_interrupted_in_any_stage_it_carries_on(study_copy, finished, stage, how):
    place = study_copy / "seed-1" / stage
    shutil.rmtree(place)
    process = start_study(study_copy)
    partial = place.with_name(f".{stage}.partial")
    # the base is done in a blink: interrupt the checks that come before it
    sign = study_copy / ".lock.holder" if stage == "base" else partial
    while not sign.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=600)
    assert not place.exists()
    if how == signal.SIGINT:
        assert (
            process.returncode == 130
            and "the same command carries on" in stderr
            and "Traceback" not in stderr
        ), stderr[-2000:]
        assert not partial.exists()
    done = run_study(study_copy)
    assert done.returncode == 0 and "23 done, 1 to run" in done.stdout, done.stderr[-2000:]
    assert place.exists() and not partial.exists() and same_scores(finished, study_copy)


def test_presets_that_differ_only_in_values_have_one_graph():
    arms = f"arms=[{', '.join(load_preset('smoke').arms)}]"
    shapes = {
        tuple((s.id, s.kind, tuple(i.id for i in s.inputs)) for s in graph(load_preset(name, settings)))
        for name, settings in (("smoke", []), ("tiny", [arms, "midtrain.control=false"]))
    }
    assert len(shapes) == 1
