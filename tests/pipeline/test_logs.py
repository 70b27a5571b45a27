"""`score`: official logs, as they come out of Inspect, give the scores that the package itself took from them."""

import contextlib
import io
import json
import shutil
import zipfile

import pandas as pd
import pytest
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelAPI, ModelOutput, modelapi

from compassion_repro import cli
from compassion_repro.pipeline.evaluate import summary

KEYS = ["question_id", "epoch", "dimension"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "A folder of an evaluation, and what `eval --json` printed of it."
    out = tmp_path_factory.mktemp("evaluated") / "out"
    words = ["world:base", "--bench", "tiny-anima,tiny-moru", "--judge", "indicator", "--limit", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert (
            cli.main(["eval", *words, "--epochs", "2", "--max-tokens", "8", "--out", str(out), "--json"]) == 0
        )
    return out, json.loads(said.getvalue())


def test_official_logs_give_the_same_scores(evaluated, tmp_path, capsys):
    out, printed = evaluated
    assert {row["benchmark"] for row in printed["scores"]} == {"anima", "moru"} and not printed["differences"]
    assert cli.main(["score", str(out / "judges"), "--out", str(tmp_path / "scores"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    own, read = (pd.read_parquet(folder / "scores.parquet") for folder in (out, tmp_path / "scores"))
    assert set(read["benchmark"]) == {"anima", "moru"} and set(read["model"]) == {"world:base"}
    for benchmark in ("anima", "moru"):
        first, second = (t[t["benchmark"] == benchmark].set_index(KEYS).sort_index() for t in (own, read))
        assert first["score"].fillna(-1).tolist() == second["score"].fillna(-1).tolist()
        assert first["language"].tolist() == second["language"].tolist()
    assert {row["benchmark"] for row in record["means"]} == {"anima", "moru"}
    assert {row["judge"] for row in record["means"]} == {"indicator/rubric"}  # a name, not a record
    assert (tmp_path / "scores" / "score.html").is_file() and len(record["outcomes"]) >= 2


def as_json_of_2024(file, **changes) -> dict:
    "A log as Inspect wrote it in its first year: one JSON file, a single score by sample, one scorer, no packages."
    log = json.loads(read_eval_log(str(file)).model_dump_json(exclude_none=True))
    for sample in log["samples"]:
        (sample["score"],) = sample.pop("scores").values()
        sample["transcript"] = {"events": sample.pop("events"), "content": sample.pop("attachments")}
    first = log["results"].pop("scores")[0]
    log["results"] |= {"scorer": {"name": first["name"]}, "metrics": first["metrics"]}
    for name in ("packages", "revision", "run_id", "task_id", "task_args_passed"):
        log["eval"].pop(name, None)
    return {"version": 1, **{n: log[n] for n in ("status", "eval", "results", "stats", "samples")}} | changes


def scored(words: list, out, capsys) -> pd.DataFrame:
    assert cli.main(["score", *map(str, words), "--out", str(out)]) == 0, capsys.readouterr().err
    return pd.read_parquet(out / "scores.parquet").drop(columns=["study", "judge", "model"])


def test_logs_in_the_shapes_of_older_versions_give_the_same_scores(evaluated, tmp_path, capsys):
    (new,) = [file for file in (evaluated[0] / "judges").rglob("*.eval") if "anima" in file.name]
    folder = tmp_path / "2024"
    folder.mkdir()
    old = folder / "2024-05-01T10-00-00+00-00_anima_x.json"
    old.write_text(json.dumps(as_json_of_2024(new)))
    today = scored([new], tmp_path / "new", capsys)
    pd.testing.assert_frame_equal(scored([folder], tmp_path / "old", capsys), today)
    cut = tmp_path / "cut.eval"  # a run that was killed: samples, and no header yet
    with zipfile.ZipFile(new) as whole, zipfile.ZipFile(cut, "w") as part:
        for name in whole.namelist():
            if name.startswith(("samples/", "_journal/")):
                part.writestr(name, whole.read(name))
    pd.testing.assert_frame_equal(scored([cut], tmp_path / "started", capsys), today)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"version": 99}, "version 99"),
        ({"samples": []}, "no scored sample"),
        ({"eval": {}}, "eval.created is missing"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused_in_one_line(changes, line, evaluated, tmp_path, capsys):
    new = next((evaluated[0] / "judges").rglob("*.eval"))
    (tmp_path / "log.json").write_text(json.dumps(as_json_of_2024(new, **changes)))
    assert cli.main(["score", str(tmp_path / "log.json"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


PROMPTS = []  # what the judge below was asked


@modelapi(name="everything-refuses")
class EverythingRefuses(ModelAPI):
    "A judge of classes for tests."

    async def generate(self, input, tools, tool_choice, config):
        PROMPTS.append(input[-1].text)
        return ModelOutput.from_content("refuses", "CLASS: REFUSES")


def test_a_judge_of_classes_counts_in_place_of_the_rules(evaluated, tmp_path, capsys):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    assert summary(out)["refuses"].max() < 100
    judge = ["judge", str(out), "--outcomes", "everything-refuses/one"]
    assert cli.main(judge) == 2 and "add --yes to agree" in capsys.readouterr().err
    assert cli.main([*judge, "--yes"]) == 0
    assert "classed 16 answers" in capsys.readouterr().out
    after = summary(out)
    assert after["refuses"].tolist() == [100, 100] and after["incoherent"].tolist() == [0, 0]
    assert after["score"].tolist() == summary(evaluated[0])["score"].tolist()  # scores count every answer
    asked = len(PROMPTS)
    assert cli.main(judge) == 0 and "nothing to class" in capsys.readouterr().out
    assert 0 < asked == len(PROMPTS) and "<question>" in PROMPTS[0]


@pytest.mark.parametrize(
    "words, line", [(["none.eval"], "no Inspect log in"), (["bad.eval"], "cannot be read")]
)
def test_bad_input_is_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.eval").write_text("no log")
    assert cli.main(["score", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not (tmp_path / "scores").exists()
