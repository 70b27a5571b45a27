"""The store: what is damaged is named and made again, two commands do not meet, a study can be moved."""

import json
import shutil
import signal

import pandas as pd
import pytest
from conftest import CRASH_SIZE, copy_study, settings, start_study, wait_for

from compassion_repro import cli
from compassion_repro.cli.__main__ import build_parser
from compassion_repro.core import files
from compassion_repro.core.errors import InputError
from compassion_repro.pipeline import run
from compassion_repro.presets import load_preset
from compassion_repro.store import artifact, checks
from compassion_repro.store.folder import Study

PRESET = load_preset("smoke", CRASH_SIZE)


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


SPOIL = {
    "truncated": lambda data: data[:-7],
    "flipped": flip,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"0",
    "another encoding": lambda data: data[:999].decode("latin-1").encode("utf-16"),
    "huge": lambda data: data + bytes(files.LARGEST),
}


def carry_on(folder, preset=PRESET) -> list[str]:
    "Run the study again in this process; what was said."
    said = []
    run.run(preset, folder, say=said.append, page=False)
    return said


def same_scores(one, other):
    a, b = (pd.read_parquet(folder / "scores.parquet").drop(columns="study") for folder in (one, other))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    return True


@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_artifact_is_named_and_not_used(study_copy, how):
    study, stages = Study(study_copy), {s.id: s for s in Study(study_copy).stages(PRESET)}
    for id, name in (
        ("mid", "model.safetensors"),
        ("sft-help", "config.json"),
        ("answers-mid", "answers.parquet"),
        ("eval-mid", "manifest.json"),
        ("probe-mid", "kl.parquet"),
    ):
        file = study_copy / "seed-1" / id / name
        file.write_bytes(SPOIL[how](file.read_bytes()))
        told = []
        with pytest.raises(InputError, match=f"seed-1/{id}.*{name}"):
            study.verified(stages[id])
        assert checks.find_pending(study, [stages[id]], told.append) == [stages[id]]
        assert (study_copy / "seed-1" / id / "manifest.json").exists()  # until it is made again
        assert (
            len(told) == 1
            and f"seed-1/{id}" in told[0]
            and name in told[0]
            and told[0].endswith("is made again")
        )


def test_what_is_damaged_is_made_again_and_nothing_else(study_copy, finished):
    for name in ("eval-mid/scores.parquet", "eval-base/manifest.json"):
        file = study_copy / "seed-1" / name
        file.write_bytes(flip(file.read_bytes()))
    (study_copy / "seed-1" / "eval-sft-help" / "grades.parquet.bak").write_text("a stranger")
    made = {p: p.stat().st_mtime_ns for p in study_copy.glob("seed-1/*/manifest.json")}
    said = carry_on(study_copy)
    assert sum("is made again" in line for line in said) == 3 and any(
        "21 done, 3 to run" in line for line in said
    )
    assert {p.parent.name for p, at in made.items() if p.stat().st_mtime_ns != at} == {
        "eval-mid",
        "eval-base",
        "eval-sft-help",
    } and same_scores(finished, study_copy)


@pytest.mark.parametrize(
    "name",
    [
        "study.yaml",
        "scores.parquet",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("record.json", "claims.json", "answers.parquet", "grades.parquet")
        ),
    ],
)
def test_damaged_files_of_the_study_are_refused_or_written_anew(study_copy, finished, capsys, name):
    for how in ("flipped", list(SPOIL)[sum(map(ord, name)) % len(SPOIL)]):
        file, study = study_copy / name, Study(study_copy)
        file.write_bytes(SPOIL[how](file.read_bytes()))
        if name.endswith("parquet"):
            with pytest.raises(InputError, match=name):
                run.analyse(study, page=False)
        if name == "study.yaml":
            assert cli.main(["report", str(study_copy)]) == 2 and name in capsys.readouterr().err
        if name == "claims.json":
            assert cli.main(["claims", str(study_copy)]) == 2 and name in capsys.readouterr().err
        assert any("24 done, 0 to run" in line for line in carry_on(study_copy)), how
        assert (
            same_scores(finished, study_copy)
            and (study_copy / "claims.json").read_bytes() == (finished / "claims.json").read_bytes()
            and study.preset == PRESET
        )


def test_a_report_does_not_mix_tables_and_stages(study_copy):
    manifest = study_copy / "seed-1" / "mid" / "manifest.json"
    values = files.read_sealed(manifest)
    files.write_sealed(manifest, values | {"key": "of other rows"})
    with pytest.raises(InputError, match="older than seed-1/mid"):
        run.analyse(Study(study_copy), page=False)
    manifest.write_text(manifest.read_text().replace("0.", "1."))
    with pytest.raises(InputError, match="seed-1/mid: manifest.json is damaged, was edited by hand"):
        run.analyse(Study(study_copy), page=False)


def test_two_runs_at_once_and_one_that_was_killed(study_copy, finished, capsys):
    shutil.rmtree(study_copy / "seed-1" / "eval-mid")
    first = start_study(study_copy)
    wait_for((study_copy / ".lock.holder").exists, first)
    for words in (
        ["run", "--preset", "smoke", "--out", str(study_copy), *settings()],
        ["report", str(study_copy)],
    ):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert (
            told.count("\n") == 1 and f"is in use by `compassion-repro run`, process {first.pid} on " in told
        ), told
    assert cli.main(["claims", str(study_copy)]) == 0  # who only reads does not wait
    wait_for((study_copy / "seed-1" / ".eval-mid.partial").exists, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    said = carry_on(study_copy)
    assert (
        any("took over the lock" in line for line in said)
        and any("1 half-written folders removed" in line for line in said)
        and any("23 done, 1 to run" in line for line in said)
    )
    assert same_scores(finished, study_copy) and not [
        p.name for p in study_copy.rglob(".*") if p.parent.name != "arrow"
    ]


def test_a_study_goes_on_where_it_is_taken(finished, tmp_path):
    there = copy_study(finished, tmp_path / "elsewhere" / "renamed")
    assert any("24 done, 0 to run" in line for line in carry_on(there))
    assert set(pd.read_parquet(there / "scores.parquet").study) == {"renamed"} and same_scores(
        finished, there
    )


ON_A_STUDY = {  # every command that takes a study: what to add
    "claims": [["--registered"], ["--general"]],
    "report": [[]],
    "tradeoff": [["--json"]],
    "export": [["--to", "csv", "--out", "answers.csv"]],
    "judge": [["--judge", "strict"], ["--judge", "indicator", "--again"]],
    "annotate": [["--sample", "4", "--out", "sheet.csv"], ["--read", "sheet.csv"]],
    "push": [["mid", "--to", "me/mid", "--dry-run"]],
}


def of_a_study() -> set[str]:
    "The commands whose first word is a study."
    commands = build_parser().commands
    for parser in commands.values():
        parser.add_own_options()
    return {name for name, own in commands.items() if any(a.dest == "study" for a in own._actions)}


def test_every_command_takes_a_copy_under_another_name(finished, tmp_path, no_pictures, monkeypatch, capsys):
    assert set(ON_A_STUDY) == of_a_study()
    monkeypatch.chdir(tmp_path)
    for name, each in ON_A_STUDY.items():
        there = copy_study(finished, tmp_path / f"for-{name}")
        for words in each:
            if "--read" in words:
                sheet = pd.read_csv("sheet.csv")
                sheet.assign(grade=1).to_csv("sheet.csv", index=False)
            status = cli.main([name, str(there), *words])
            assert status == 0, (name, words, capsys.readouterr().err)
        assert (
            cli.main(["claims", str(there), "--registered"]) == 0
        )  # and a judge's rows do not mix the names
        assert set(Study(there).table("scores")["study"]) == {there.name}
    assert (there.parent / "for-report" / "report.html").is_file()


def test_a_table_that_was_put_there_keeps_its_name(finished, tmp_path, capsys):
    there = copy_study(finished, tmp_path / "renamed")
    (there / "record.json").unlink()  # nothing says any more that the table was written here
    for name in ("report", "tradeoff"):
        assert cli.main([name, str(there)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "belongs to the study 'study', not to 'renamed'" in told
        assert f"run --out {there}" in told


def test_rows_that_stayed_behind(finished, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"Question {n}?", "response": f"Answer {n}."}) + "\n"
            for n in range(12)
        )
    )
    own = load_preset("smoke", [*CRASH_SIZE, f"data.sft-help={rows}"])
    study = Study(copy_study(finished, tmp_path / "study"))
    (study.folder / "study.yaml").unlink()
    for stage in study.stages(own):  # as if it had been trained on them
        file = study.folder / stage.place / "manifest.json"
        files.write_sealed(file, files.read_sealed(file) | {"key": stage.key})
    carry_on(study.folder, own)
    rows.unlink()
    there = study.folder.rename(tmp_path / "there")
    assert any("24 done, 0 to run" in line for line in carry_on(there, own))
    run.analyse(Study(there), page=False)
    shutil.rmtree(there / "seed-1" / "eval-mid")
    with pytest.raises(
        InputError,
        match=(
            "rows.jsonl is not on this machine, and eval-mid is still to be made: say where with --set"
            " data.sft-help=PATH"
        ),
    ):
        carry_on(there, own)


def test_names_do_not_lead_out_of_the_study(tmp_path):
    for setting in (
        "benchmarks={../anima: {task: anima, data: 'world:anima', epochs: 1}}",
        "benchmarks={/tmp/anima: {task: anima, data: 'world:anima', epochs: 1}}",
        "arms=[../sft-help]",
        "arms=[sft-help@../base]",
        "models.given={../mid: 'world:base'}",
        "margin.pairs=[../world]",
        "generation.templates=[../plain]",
        "name=..",
        "name=../tiny",
    ):
        with pytest.raises(InputError) as error:
            load_preset("smoke", [setting])
        assert "\n" not in str(error.value), setting
    place = tmp_path / "study" / "seed-1" / "mid"
    place.mkdir(parents=True)
    files.write_sealed(
        place / "manifest.json", {"key": "1", "seed": 1, "stage": "../../mid", "files": {}, "result": {}}
    )
    assert Study(tmp_path / "study").manifests() == []


def test_what_others_read_is_verified(study_copy, capsys):
    weights = study_copy / "seed-1" / "mid" / "model.safetensors"
    weights.write_bytes(flip(weights.read_bytes()))
    for words in (
        ["push", str(study_copy), "mid", "--to", "me/mid", "--dry-run"],
        [
            "eval",
            str(weights.parent),
            "--bench",
            "tiny-anima",
            "--judge",
            "indicator",
            "--out",
            str(study_copy.parent / "eval"),
        ],
    ):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert (
            told.count("\n") == 1
            and "seed-1/mid: the content of model.safetensors is not what was written: run the study again"
            in told
        ), told
    assert not (study_copy.parent / "eval").exists()


def test_equal_stages_of_a_neighbour_are_taken_over(study_copy, capsys):
    other = study_copy.with_name("other")
    words = ["run", "--preset", "smoke", "--out", str(other), "--no-report", *settings()]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"stages are equal to those of {study_copy.name} and taken over: base, answers-base" in said, said
    assert "(--no-reuse makes them anew)" in said and "[1/" not in said
    weights = [folder / "seed-1" / "mid" / "model.safetensors" for folder in (study_copy, other)]
    assert weights[0].samefile(weights[1]) and same_scores(study_copy, other)


def test_a_study_that_was_judged_again_is_published_with_one_judge(study_copy, capsys):
    table = pd.read_parquet(study_copy / "scores.parquet")
    both = pd.concat([table, table.assign(judge="strict", score=0.0)], ignore_index=True)
    artifact.write_recorded(study_copy, "scores.parquet", both.to_parquet)
    words = ["push", str(study_copy), "mid", "--to", "me/mid", "--dry-run"]
    for more, judge in (([], "indicator"), (["--judge", "strict"], "strict")):
        assert cli.main([*words, *more]) == 0
        card = capsys.readouterr().out
        assert f"Judge: `{judge}`." in card and "## What is left of the value" in card
        assert "about these checkpoints alone" in card and "Margin without a judge, how much" in card
    assert cli.main([*words, "--judge", "gemini"]) == 2
    assert "there are indicator, strict" in capsys.readouterr().err
