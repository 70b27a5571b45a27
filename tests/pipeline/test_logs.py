"""`score`: official logs, as they come out of Inspect, give the scores that the package itself took from them."""

import json

import pandas as pd
import pytest

from compassion_repro import cli

KEYS = ["question_id", "epoch", "dimension"]


def test_official_logs_give_the_same_scores(tmp_path, capsys):
    words = ["world:base", "--bench", "tiny-anima,tiny-moru", "--judge", "indicator", "--limit", "4"]
    options = ["--epochs", "2", "--max-tokens", "8", "--out", str(tmp_path / "out")]
    assert cli.main(["eval", *words, *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["benchmark"] for row in printed["scores"]} == {"anima", "moru"} and not printed["differences"]
    assert (
        cli.main(["score", str(tmp_path / "out" / "judges"), "--out", str(tmp_path / "scores"), "--json"])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    own, read = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("out", "scores"))
    assert set(read["benchmark"]) == {"anima", "moru"} and set(read["model"]) == {"world:base"}
    for benchmark in ("anima", "moru"):
        first, second = (t[t["benchmark"] == benchmark].set_index(KEYS).sort_index() for t in (own, read))
        assert first["score"].fillna(-1).tolist() == second["score"].fillna(-1).tolist()
        assert first["language"].tolist() == second["language"].tolist()
    assert {row["benchmark"] for row in record["means"]} == {"anima", "moru"}
    assert (tmp_path / "scores" / "score.html").is_file() and len(record["outcomes"]) >= 2


@pytest.mark.parametrize(
    "words, line", [(["none.eval"], "no Inspect log in"), (["bad.eval"], "cannot be read")]
)
def test_bad_input_is_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.eval").write_text("no log")
    assert cli.main(["score", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not (tmp_path / "scores").exists()
