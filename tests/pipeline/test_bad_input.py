"""Bad input at the command line: one clear line, status 2, and nothing lost."""

import json
import os
import shutil
import subprocess
import types
from pathlib import Path

import pytest
from conftest import FORKS, SHARED_DATA, assert_one_line, command, run_study, settings
from forks import COMMAND

from compassion_repro import cli
from compassion_repro.data import world
from compassion_repro.store.folder import Study

NO_BENCHMARK = ("benchmarks={}",)  # where the answers are not the point: base, training, margins
ANIMA_ALONE = ("benchmarks.moru=null", "benchmarks.leak=null")  # where the questions are not the point


@pytest.fixture
def refused(capsys, tmp_path):
    "Run the command in this process and expect a refusal; returns the line."

    def run(*words, out=tmp_path / "study"):
        status = cli.main(["run", "--preset", "smoke", "--out", str(out), *settings(), *words])
        done = types.SimpleNamespace(returncode=status, stderr=capsys.readouterr().err)
        assert_one_line(done)
        return done.stderr

    return run


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--preset", "tinny"], "unknown preset 'tinny' (did you mean tiny?)"),
        (["run", "--set", "sft.learing_rate=1"], "unknown key 'sft.learing_rate'"),
        (["run", "--set", "sft.steps=many"], "'sft.steps'"),
        (["run", "--set", "sft"], "key=value"),
        (["run", "--seeds", "0"], "--seeds"),
        (["claims", "nowhere"], "is not a study folder"),
        (["fly"], "invalid choice"),
        (["claim", "studies/tiny"], "(did you mean claims"),
        (
            ["plan", "--set", "arms=[sft-help,", "sft-code]"],
            "quote it whole, as in --set 'arms=[sft-help, sft-code]'",
        ),
    ],
)
def test_mistakes_on_the_command_line(words, said, capsys):
    status = cli.main(words)
    assert_one_line(types.SimpleNamespace(returncode=status, stderr=capsys.readouterr().err), said)


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "missing.jsonl"),
        (b"", "empty"),
        (b'{"instruction": "a", "respo', "no usable row"),
        (b'{"title": "a", "body": "b"}\n' * 5, "title"),
        (
            b'{"instruction": "", "response": "x"}\n' * 4
            + b"\xff\xfe\n"
            + b'{"instruction": "q", "response": 3}\n',
            "no usable row",
        ),
    ],
    ids=["missing", "empty", "truncated", "wrong schema", "bad rows only"],
)
def test_data_files(refused, tmp_path, content, said):
    file = tmp_path / "missing.jsonl"
    if content is not None:
        file.write_bytes(content)
    line = refused("--set", f"data.sft-help={file if content is not None else str(file)}")
    assert file.name in line
    assert not list((tmp_path / "study").glob("seed-*/mid")), "refused before anything was trained"


def test_a_model_folder_that_is_none(refused, tmp_path):
    (tmp_path / "model").mkdir()
    assert "model" in refused("--set", f"models.base={tmp_path / 'model'}")
    assert "not a hub id" in refused("--set", "models.base=nobody/nothing here", out=tmp_path / "other")


def test_benchmark_folders(refused, tmp_path):
    folder = world.write_benchmark("anima", tmp_path / "mine", {"en": 3})
    (folder / "README.md").unlink()
    assert "README" in refused("--set", f"benchmarks.anima.data={folder}")
    assert "no-such" in refused(
        "--set", f"benchmarks.anima.data={tmp_path / 'no-such'}", out=tmp_path / "other"
    )


def test_folders_that_cannot_be_written(refused, tmp_path):
    assert "--out" in refused(out="/proc/study")
    (tmp_path / "file").write_text("in the way")
    assert "--out" in refused(out=tmp_path / "file" / "study")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("somebody's work")
    assert "is not empty" in refused(out=tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "somebody's work"


@pytest.mark.long
def test_a_disk_that_fills_up_keeps_what_is_finished(study_copy, finished):
    shutil.rmtree(study_copy / "seed-1" / "mid")
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
    process = FORKS.start(small + COMMAND, [*command(study_copy), *settings()][3:])
    _, stderr = process.communicate()
    done = types.SimpleNamespace(returncode=process.returncode, stderr=stderr)
    assert_one_line(done, "no room left", "free some space")
    assert (
        not list((study_copy / "seed-1").glob(".*.partial"))
        and (study_copy / "seed-1" / "sft-help" / "manifest.json").exists()
    )
    assert run_study(study_copy).returncode == 0


def test_a_disk_that_is_really_full(study_copy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("this machine cannot mount a small disk")
    try:
        assert_one_line(run_study(disk / "study"), "no room left")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_folder(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("this machine cannot mount a read-only disk")
    try:
        assert_one_line(run_study(disk / "study"), "cannot write", "--out")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_damaged_settings_are_not_replaced_by_others(study_copy):
    (study_copy / "study.yaml").write_text("{ not yaml: [")
    assert_one_line(
        run_study(study_copy, "sft.learning_rate=0.001"),
        "study.yaml is missing or damaged",
        "made with other settings than these",
    )


def test_a_damaged_manifest_is_made_again(study_copy, finished):
    (study_copy / "seed-1" / "eval-base" / "manifest.json").write_text('{"key": ')
    done = run_study(study_copy)
    assert done.returncode == 0 and "23 done, 1 to run" in done.stdout, done.stderr


def test_a_users_own_benchmark_is_run_whole_under_a_size_that_would_cut_it(tmp_path):
    folder = world.write_benchmark("anima", tmp_path / "mine", {"en": 5, "es": 2})
    out = tmp_path / "study"
    done = run_study(
        out, f"benchmarks.anima.data={folder}", "benchmarks.anima.size={en: 1}", "arms=[]", *ANIMA_ALONE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = Study(out).table("answers")
    assert answers[answers.benchmark == "anima"].question_id.nunique() == 7


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the sample rows are not beside this checkout")
@pytest.mark.long
def test_real_rows_are_trained_on_and_none_is_lost(tmp_path):
    out = tmp_path / "study"
    counts = {"sft-help": ("dolly_rows.jsonl", 20), "sft-code": ("code_rows.jsonl", 28)}
    for name, count in counts.values():
        lines = (SHARED_DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:count]), encoding="utf-8")
    rows = [f"data.{arm}={tmp_path / name}" for arm, (name, _) in counts.items()]
    done = run_study(out, *rows, "arms=[sft-help, sft-code]", *NO_BENCHMARK)
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = {m["stage"]: m["result"] for m in Study(out).manifests()}
    for arm, (_, count) in counts.items():
        place = out / "seed-1" / arm
        trained, held_out = (
            [json.loads(line) for line in (place / f"{name}.jsonl").open(encoding="utf-8")]
            for name in ("rows", "held_out")
        )
        assert (
            len(trained) + len(held_out) == count == manifests[arm]["data"]["read"]
            and not manifests[arm]["data"]["dropped"]
        )
        assert manifests[arm]["passes"] >= 1  # every row was seen
    assert manifests["sft-help"]["steps"] == manifests["sft-code"]["steps"]
    assert "C1" in done.stdout


def test_every_cli_error_can_be_debugged(tmp_path):
    done = subprocess.run(
        command(tmp_path, "--debug", "--set", "sft.steps=0"), capture_output=True, text=True
    )
    assert "Traceback" in done.stderr and "sft.steps" in done.stderr


def test_nothing_of_this_machine_is_written(finished):
    text = "".join(p.read_text(encoding="utf-8") for p in finished.rglob("manifest.json"))
    assert str(Path.home()) not in text and str(finished) not in text


@pytest.mark.long
def test_a_refused_start_leaves_the_folder_to_the_corrected_one(tmp_path):
    out, rows = tmp_path / "study", tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"Question {n}?", "response": f"Answer {n}."}) + "\n"
            for n in range(12)
        )
    )
    assert_one_line(
        run_study(out, f"data.sft-help={tmp_path / 'rosw.jsonl'}", "arms=[sft-help]"), "rosw.jsonl"
    )
    done = run_study(out, f"data.sft-help={rows}", "arms=[sft-help]", *ANIMA_ALONE)
    assert done.returncode == 0, done.stderr[-2000:]
    rows.write_text(rows.read_text().replace("Answer", "Reply"))
    again = run_study(out, f"data.sft-help={rows}", "arms=[sft-help]", *ANIMA_ALONE)
    # edited rows are noticed: the arm, its answers, its grades, its margin
    assert "8 done, 4 to run" in again.stdout, again.stdout


def test_a_missing_piece_of_a_finished_stage_is_made_again(study_copy):
    (study_copy / "seed-1" / "eval-mid" / "scores.parquet").unlink()
    done = run_study(study_copy)
    assert done.returncode == 0 and "23 done, 1 to run" in done.stdout, done.stderr[-2000:]


def test_one_usable_row_is_refused_before_anything_is_trained(refused, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n')
    assert "at least 2 are needed" in refused("--set", f"data.sft-help={file}")
    assert not list((tmp_path / "study").glob("seed-*"))


@pytest.mark.long
def test_rows_longer_than_a_sequence_are_cut_and_counted(tmp_path):
    file, out = tmp_path / "long.jsonl", tmp_path / "study"
    file.write_text(
        "".join(
            json.dumps({"instruction": f"Question {n}?", "response": "a long answer, " * 300}) + "\n"
            for n in range(12)
        )
    )
    done = run_study(out, f"data.sft-help={file}", "arms=[sft-help]", *NO_BENCHMARK)
    assert done.returncode == 0 and "cut to fit a sequence" in done.stdout, done.stderr[-2000:]
    result = next(m["result"] for m in Study(out).manifests() if m["stage"] == "sft-help")
    assert result["data"]["truncated"] == 12 and result["split_rows"] == 0
