"""`export`: one row an answer with every score, in three forms; no file is overwritten unasked."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from compassion_repro import cli
from compassion_repro.pipeline.evaluation_setup import Setup
from compassion_repro.presets import load_preset
from compassion_repro.store.results import ANSWER, EXPORT_COLUMNS, WRITERS
from compassion_repro.study import Generation

TEXTS = ['He said "no",\nthen left', "", "=1+1", "一只猫"]
READERS = {
    "csv": lambda path: pd.read_csv(path, keep_default_na=False, na_values={"score:Care:strict": ""}),
    "jsonl": lambda path: pd.DataFrame(map(json.loads, path.read_text(encoding="utf-8").splitlines())),
    "parquet": pd.read_parquet,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A study folder with four answers, two judges and a task that judges itself; the strict judge fails once."
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.yaml").write_text(yaml.safe_dump(load_preset("smoke").resolved()))
    keys = [
        (model, 1, bench, "en", q, q, 1)
        for bench, q in (("anima", "q1"), ("logic", "q2"))
        for model in ("base", "mid")
    ]
    columns = ["model", "seed", "benchmark", "language", "item_id", "question_id", "epoch"]
    answers = pd.DataFrame(keys, columns=columns)
    facts = dict(prompt="Was?", tokens=3, stop_reason="stop", empty=False, looping=False)
    answers.assign(text=TEXTS, **facts).to_parquet(study / "answers.parquet")
    parts = [
        answers[:2].assign(judge=judge, dimension=dimension, score=values)
        for judge in ("strict", "indicator")
        for dimension, values in (
            ("Care", [1 / 3, None if judge == "strict" else 0.5]),
            ("overall", [0.25, 0.5]),
        )
    ]
    parts.append(answers[2:].assign(judge="task", dimension="overall", score=[1.0, 0.0]))
    scores = pd.concat(parts, ignore_index=True).assign(study="study")
    scores.sample(frac=1, random_state=0).to_parquet(study / "scores.parquet")
    return study


@pytest.mark.parametrize("form", WRITERS)
def test_every_answer_is_a_row_with_its_own_scores(folder, form, capsys):
    assert cli.main(["export", "study", "--to", form]) == 0
    assert capsys.readouterr().out == f"4 answers in 19 columns: study-answers.{form}\n"
    table = READERS[form](folder.parent / f"study-answers.{form}")
    scores = ["overall:indicator", "Care:indicator", "overall:strict", "Care:strict", "overall:task"]
    assert list(table) == [*EXPORT_COLUMNS, *(f"score:{name}" for name in scores)]
    assert table["answer"].tolist() == TEXTS
    found = pd.read_parquet(folder / "scores.parquet")
    rows = table.set_index(ANSWER)
    for row in found.to_dict("records"):
        value = rows.loc[tuple(row[key] for key in ANSWER), f"score:{row['dimension']}:{row['judge']}"]
        assert (
            pd.isna(value)
            if pd.isna(row["score"])
            else float(value) == pytest.approx(row["score"], abs=1e-14)
        )
    given = pd.to_numeric(table[[f"score:{name}" for name in scores]].stack(), errors="coerce").notna().sum()
    assert given == found["score"].notna().sum()


def test_answers_without_scores_are_exported_alone(folder):
    (folder / "scores.parquet").unlink()
    assert cli.main(["export", "study", "--to", "parquet", "--out", "mine.parquet"]) == 0
    assert list(pd.read_parquet("mine.parquet")) == list(EXPORT_COLUMNS)


def test_a_file_is_overwritten_only_when_asked(folder, capsys):
    out = folder.parent / "mine.csv"
    out.write_text("precious")
    words = ["export", "study", "--to", "csv", "--out", "mine.csv"]
    assert cli.main(words) == 2
    assert (
        capsys.readouterr().err.endswith("or add --force to overwrite it\n") and out.read_text() == "precious"
    )
    assert cli.main([*words, "--force"]) == 0 and len(pd.read_csv(out)) == 4
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine.csv", "study"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["nowhere", "--to", "csv"], "neither a study nor an evaluation"),
        (["study", "--to", "csv", "--out", "study/answers.parquet", "--force"], "in the study's own folder"),
        (["study", "--to", "csv", "--out", "nowhere/a.csv"], "nowhere is no folder"),
        (["study", "--to", "csv", "--out", ".", "--force"], "is a folder"),
        (["study", "--to", "xlsx"], "invalid choice: 'xlsx'"),
        (["study"], "required: --to"),
    ],
)
def test_what_cannot_be_exported_is_one_line(folder, words, told, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["export", *words]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("spoil, told", [(b"PAR1 cut", "is damaged"), (None, "has no answers yet")])
def test_a_study_without_readable_answers_is_one_line(folder, spoil, told, capsys):
    (folder / "answers.parquet").write_bytes(spoil) if spoil else (folder / "answers.parquet").unlink()
    assert cli.main(["export", "study", "--to", "csv"]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1 and not (folder.parent / "study-answers.csv").exists()


def test_export_needs_no_torch(folder):
    code = (
        "import sys\nfrom compassion_repro.cli import main\nstatus = main(['export', 'study', '--to', 'csv'])\n"
        "print(status, [m for m in ('torch', 'transformers', 'datasets', 'inspect_ai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_an_evaluation_is_exported_like_a_study(folder, capsys):
    (folder / "study.yaml").unlink()
    setup = Setup({"anima": None, "logic": None}, {"anima": "anima", "logic": "logic"}, Generation())
    (folder / "eval.yaml").write_text(yaml.safe_dump(setup.plain()))
    assert cli.main(["export", "study", "--to", "parquet"]) == 0
    assert capsys.readouterr().out == "4 answers in 19 columns: study-answers.parquet\n"
    assert pd.read_parquet("study-answers.parquet")["answer"].tolist() == TEXTS


def test_a_study_that_asks_nothing_has_no_answers(folder, capsys):
    preset = load_preset("smoke", ["benchmarks={}"])
    (folder / "study.yaml").write_text(yaml.safe_dump(preset.resolved()))
    (folder / "answers.parquet").unlink()
    assert cli.main(["export", "study", "--to", "csv"]) == 2
    assert "asks no questions (benchmarks), so it has no answers" in capsys.readouterr().err
