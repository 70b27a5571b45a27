"""A value as a file: its faults, its questions as a benchmark, its pairs in a study's graph."""

import json

import pandas as pd
import pytest
import yaml

from compassion_repro import cli
from compassion_repro.core.errors import InputError
from compassion_repro.data.values import find_value, read_value
from compassion_repro.pipeline import run
from compassion_repro.presets import load_preset, with_settings
from compassion_repro.store import graph


def keys(*settings: str) -> dict[str, str]:
    return {stage.id: stage.key for stage in graph.graph(load_preset("smoke", list(settings)), seeds=1)}


def test_a_value_adds_its_pairs_and_its_questions():
    before, after = keys(), keys("value=[compassion, honesty]")
    changed = {name for name in before if before[name] != after[name]}
    assert {name.partition("-")[0] for name in changed} == {"probe", "answers", "eval"}
    without = keys("value=[compassion, honesty]", "benchmarks.honesty=null")
    changed = {name for name in before if before[name] != without[name]}
    assert changed and all(name.startswith("probe") for name in changed)
    assert keys("value=compassion") == before and keys("value=honesty") != after
    assert "value" not in load_preset("smoke").resolved()


def test_questions_of_a_value_are_a_benchmark_of_a_study():
    setting = 'benchmarks.honesty={task: anima, data: "value:honesty", epochs: 1}'
    config = graph.benchmark_config(load_preset("smoke", [setting]).benchmarks["honesty"])
    assert config["data"].startswith("value:honesty#") and "size" not in config
    added = load_preset("smoke", ["value=honesty", "benchmarks.honesty.epochs=1"])
    assert graph.benchmark_config(added.benchmarks["honesty"]) == config
    again = with_settings(added, ["lora.rank=2"])
    without = load_preset("smoke", ["value=honesty", "benchmarks.honesty=null"])
    assert "honesty" not in with_settings(without, ["lora.rank=2"]).benchmarks
    assert again.benchmarks == added.benchmarks and list(added.benchmarks)[-1] == "honesty"


def test_a_study_of_a_second_value_is_one_setting(tmp_path):
    small = [
        *(
            "arms=[]",
            "midtrain={rows: 24, held_out: 6, steps: 1}",
            "threads=1",
            "generation.max_new_tokens=8",
        ),
        *("benchmarks.moru=null", "benchmarks.leak=null", "benchmarks.anima={size: {en: 1}, epochs: 1}"),
    ]
    preset = load_preset("smoke", ["value=honesty", "benchmarks.honesty.epochs=1", *small])
    study = run.run(preset, tmp_path / "study", say=lambda line: None, page=False)
    scores, margins = study.table("scores"), study.table("margin")
    asked = scores[(scores["benchmark"] == "honesty") & (scores["dimension"] == "overall")]
    assert asked.groupby("model")["question_id"].nunique().to_dict() == {"base": 20, "mid": 20}
    assert asked["score"].notna().all() and set(margins["source"]) == {"honesty"} and len(margins) >= 80


def test_a_value_of_ones_own_is_asked_and_judged(tmp_path, capsys):
    plain = yaml.safe_load(find_value("honesty").read_text(encoding="utf-8"))
    own = tmp_path / "mine.yaml"
    own.write_text(yaml.safe_dump({**plain, "name": "mine", "questions": plain["questions"][:2]}))
    words = ["eval", "world:base", "--bench", f"value:{own}", "--judge", "indicator", "--epochs", "1"]
    assert cli.main([*words, "--max-tokens", "8", "--out", str(tmp_path / "out")]) == 0
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert set(scores["benchmark"]) == {"mine"} and set(scores["dimension"]) == {"Admitting", "overall"}
    assert scores["judge_valid"].all()


def test_leaks_and_faults_are_listed_and_end_with_status_1(tmp_path, capsys):
    plain = yaml.safe_load(find_value("honesty").read_text(encoding="utf-8"))
    plain["pairs"]["Admitting"][0]["neutral"] = "and that is all."
    plain["questions"][0]["tags"] = ["Admiting"]
    own, rows = tmp_path / "mine.yaml", tmp_path / "rows.jsonl"
    own.write_text(yaml.safe_dump({**plain, "name": "mine"}))
    told = plain["pairs"]["Correcting"][3]["value"].upper()
    rows.write_text(json.dumps({"prompt": "Hm?", "completion": f"Well, {told}"}))
    assert cli.main(["value", "check", str(own), "--rows", str(rows)]) == 1
    said = capsys.readouterr().out
    for line in (
        "admitting-1: the continuations have 25 and 4 words",
        "'Admiting' is no dimension of this value",
        f"the value of correcting-4 is quoted in row 1 of {rows}",
        "3 to put right",
    ):
        assert line in said


@pytest.mark.parametrize(
    "words, line",
    [
        (["check", "courage"], "unknown value 'courage'"),
        (["check", "compassion"], "its pairs are those of margin.pairs"),
        (["new", "Courage!"], "is no name for a value"),
        (["check", "honesty", "--rows", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["value", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


@pytest.mark.parametrize("setting", ["value=[]", "value=[honesty, honesty]", "value="])
def test_a_value_is_named_once(setting):
    with pytest.raises(InputError, match="value"):
        load_preset("smoke", [setting])


def test_the_shipped_value_is_balanced():
    value = read_value("honesty")
    gap = [len(row["value"]) - len(row["neutral"]) for rows in value.pairs.values() for row in rows]
    assert len(gap) == 40 and abs(sum(gap) / 40) < 5 and len(value.questions) == 20
    assert {tag for row in value.questions for tag in row["tags"]} == {
        d["dimension"] for d in value.dimensions
    }
