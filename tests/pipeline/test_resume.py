"""A stage that is cut off: carried on from its checkpoint, its answers, its grades; ended by signals, full
disks and damage.
"""

import errno
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import CRASH_SIZE, copy_study
from test_judge import HEARD, WORKING  # with them the judge that costs money

from compassion_repro import cli
from compassion_repro.core import files, signals
from compassion_repro.core.errors import InputError, Notice
from compassion_repro.evaluation import generate
from compassion_repro.evaluation.replies import Replies
from compassion_repro.pipeline import ray_engine, stages
from compassion_repro.pipeline import run as pipeline
from compassion_repro.presets import load_preset
from compassion_repro.store import graph
from compassion_repro.store.folder import Study
from compassion_repro.training import checkpoints, models, static_decoding, supervised
from compassion_repro.training.recording import Unrecorded

# a line of the log every other step
LONGER = (
    "midtrain.steps=40",
    "midtrain.batch_size=2",
    "midtrain.micro_batch=1",
    "midtrain.length=64",
    "midtrain.dose=steps",
)
EACH_STEP = ("compute.checkpoint_minutes=0.0000001",)  # a checkpoint after every step


def without(finished, out, stage_id, *more):
    """A copy of the finished study without one stage, and what runs that stage there; the finished study is
    what an uninterrupted run makes.
    """
    study, preset = Study(copy_study(finished, out)), load_preset("smoke", [*CRASH_SIZE, *more])
    stages.prepare(preset)
    stage = next(stage for stage in graph.graph(preset) if stage.id == stage_id)
    shutil.rmtree(study.folder / stage.place)
    told = []

    def run(*machine, report=told.append):
        return stages.run_stage(study, load_preset("smoke", [*CRASH_SIZE, *more, *machine]), stage, report)

    return study, stage, run, told


@pytest.fixture
def cut(finished, tmp_path):
    return lambda *words: without(finished, tmp_path / "study", *words)


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    "The same study with a mid-training of forty steps, never interrupted."
    study, _, run, _ = without(finished, tmp_path_factory.mktemp("whole") / "study", "mid", *LONGER)
    run()
    return study.folder


@pytest.fixture
def cut_mid(whole, tmp_path):
    return without(whole, tmp_path / "study", "mid", *LONGER)


def hidden(study, stage):
    return (study.folder / stage.place).with_name(f".{stage.id}.checkpoints")


def training_log(manifest):
    return [
        {name: value for name, value in record.items() if name != "seconds"}
        for record in manifest["result"]["log"]
    ]


def assert_same_training(study, finished, stage):
    "Weights and log are those of the uninterrupted run, to the last bit; nothing is left over."
    for name in ("model.safetensors", "rows.jsonl", "held_out.jsonl"):
        assert (study.folder / stage.place / name).read_bytes() == (
            finished / stage.place / name
        ).read_bytes(), name
    ours, theirs = study.manifest(stage), Study(finished).manifest(stage)
    assert training_log(ours) == training_log(theirs) and study.done(stage)
    assert all(
        ours["result"][name] == theirs["result"][name]
        for name in ("loss_before", "loss_after", "gain", "gain_low", "tokens")
    )
    assert not hidden(study, stage).exists()


@contextmanager
def at_step(number, act):
    "Something that happens in the middle of an optimiser step."
    real, happened = supervised.SFTTrainer.training_step, []

    def step(trainer, *args, **kwargs):
        if trainer.state.global_step == number - 1 and not happened:
            happened.append(number)
            act()
        return real(trainer, *args, **kwargs)

    with mock.patch.object(supervised.SFTTrainer, "training_step", step):
        yield happened


def power_cut():
    raise SystemExit("the power went")


# ---- training


def test_a_signal_ends_the_step_and_saves_it(cut_mid, whole, tmp_path):
    study, stage, run, told = cut_mid
    with (
        at_step(7, lambda: signal.raise_signal(signal.SIGTERM)) as happened,
        pytest.raises(KeyboardInterrupt) as interrupt,
    ):
        run()
    assert happened and interrupt.value.args == (signal.SIGTERM,)
    folder = hidden(study, stage)
    assert (folder / "key").read_text() == stage.key and checkpoints.is_whole(folder / "checkpoint-7")
    assert not list(folder.rglob("training_args.bin")) and not (study.folder / stage.place).exists()
    study.folder = study.folder.rename(tmp_path / "moved")  # as on another machine
    with mock.patch.object(supervised, "row_losses", wraps=models.row_losses) as measured:
        run()
    # the live and the merged model: what stood before training was not measured again
    assert measured.call_count == 2
    assert any(isinstance(line, Notice) and "carrying on from step 7 of 40" in line for line in told), told
    assert_same_training(study, whole, stage)


def test_an_arm_is_carried_on_even_from_its_last_step(cut, finished):
    study, stage, run, told = cut("sft-help")
    last = Study(finished).manifest(stage)["result"]["steps"]
    for step in (1, last):
        with at_step(step, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            run()
    run()
    assert [line for line in told if "carrying on" in line] == [
        f"sft-help: carrying on from step {step} of {last}" for step in (1, last)
    ]
    assert_same_training(study, finished, stage)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(cut_mid, whole):
    study, stage, run, told = cut_mid
    with at_step(10, power_cut), pytest.raises(SystemExit):
        run(*EACH_STEP, "compute.checkpoints_kept=2")
    assert sorted(path.name for path in hidden(study, stage).glob("checkpoint-*")) == [
        "checkpoint-8",
        "checkpoint-9",
    ]
    newest = hidden(study, stage) / "checkpoint-9" / "optimizer.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    run()
    assert any("checkpoint-9 is damaged" in line for line in told) and any(
        "carrying on from step 8" in line for line in told
    )
    assert_same_training(study, whole, stage)


class Program:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_that_holds_a_program_is_not_opened(cut, finished, tmp_path, monkeypatch):
    study, stage, run, told = cut("sft-help")
    monkeypatch.chdir(tmp_path)
    with at_step(1, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run()
    torch.save(Program(), hidden(study, stage) / "checkpoint-1" / "optimizer.pt")
    checkpoints.seal(hidden(study, stage) / "checkpoint-1")  # whoever brought it sealed it too
    run()
    assert not (tmp_path / "executed").exists() and not any("carrying on" in line for line in told)
    assert_same_training(study, finished, stage)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(cut, finished):
    study, stage, run, told = cut("sft-help")
    _, hard = limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(line):
        told.append(line)
        if "could not be written" in line:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)  # room again

    try:
        with at_step(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))):
            run(*EACH_STEP, report=report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    [line] = [line for line in told if "could not be written" in line]
    assert (
        "the checkpoint of step 1" in line
        and "training goes on without it" in line
        and isinstance(line, Notice)
    )
    assert_same_training(study, finished, stage)


def test_checkpoints_keep_to_their_budget_and_what_another_key_left_is_thrown_away(cut, finished):
    study, stage, run, told = cut("sft-help")
    shutil.copytree(finished / stage.place, hidden(study, stage) / "checkpoint-1")
    (hidden(study, stage) / "key").write_text("of another configuration")
    seen = []

    def report(line):
        told.append(line)
        seen.extend(hidden(study, stage).glob("checkpoint-*"))

    run(*EACH_STEP, "compute.checkpoint_gb=0.0001", report=report)
    assert not seen and any(
        "no checkpoint is written: it takes about" in line and "compute.checkpoint_gb=0.0001" in line
        for line in told
    )
    assert not any("carrying on" in line or "damaged" in line for line in told)
    assert_same_training(study, finished, stage)


# ---- answers

BATCHES = "generation.batch_size=8"  # several of them


def answers_of(folder, stage):
    return pd.read_parquet(folder / stage.place / "answers.parquet")


@contextmanager
def at_batch(number, act):
    "Something that happens when a batch of answers is to be generated."
    real, asked = generate._answer_batch, []

    def batch(*args, **kwargs):
        asked.append(len(args[1]))
        if len(asked) == number:
            act()
        return real(*args, **kwargs)

    with mock.patch.object(generate, "_answer_batch", batch):
        yield asked


def test_the_manifest_names_the_engines_that_answered(cut, finished):
    "A first run decodes two batches with a cache of fixed size; in the second no step can be recorded."
    study, stage, run, told = cut(
        "answers-mid", BATCHES, "generation.engine=static", "generation.temperature=0"
    )

    def refuse(step, device):
        step()
        raise Unrecorded("no room for it", out_of_memory=True)

    with at_batch(3, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run()
    with mock.patch.object(static_decoding, "record", refuse):
        result = run()["result"]
    assert result["engine"] == "static, then transformers" and "no room for it" in result["engine_reason"]
    assert sum("plain generate decodes" in str(line) for line in told) == 1
    answers = answers_of(study.folder, stage)
    assert list(answers) == list(answers_of(finished, stage)) and answers.text.notna().all()


def test_answers_go_on_with_the_batches_that_are_missing(cut, finished, tmp_path):
    other, _, run, _ = without(finished, tmp_path / "other", "answers-mid", BATCHES)
    run()
    study, stage, run, told = cut("answers-mid", BATCHES)
    whole = answers_of(other.folder, stage)
    with (
        mock.patch.object(generate, "FLUSH_SECONDS", 0),
        at_batch(3, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        run()
    parts = files.intact_parts(hidden(study, stage), "answers-*.parquet")
    assert len(parts) == 2
    os.truncate(parts[1], parts[1].stat().st_size - 9)  # and the second one is damaged
    with at_batch(0, None) as asked:
        run()
    assert sum(asked) == len(whole) - 8  # one batch was whole
    assert any(isinstance(line, Notice) and "carrying on with" in line for line in told)
    pd.testing.assert_frame_equal(answers_of(study.folder, stage), whole)
    assert answers_of(finished, stage).text.tolist() == whole.text.tolist()
    assert not hidden(study, stage).exists()


def test_a_full_disk_ends_the_answering_in_one_line_and_keeps_what_is_there(cut, finished):
    study, stage, run, told = cut("answers-mid", BATCHES)
    real, written = files.save_part, []

    def save_part(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with (
        mock.patch.object(generate, "FLUSH_SECONDS", 0),
        mock.patch.object(generate, "save_part", save_part),
        pytest.raises(InputError) as error,
    ):
        run()
    message = str(error.value)
    assert "\n" not in message and all(
        words in message
        for words in ("no room left", "GB in checkpoints", "GB in finished stages", "GB in the hub's cache")
    )
    assert len(files.intact_parts(hidden(study, stage), "answers-*.parquet")) == 1
    with at_batch(0, None) as asked:
        run()
    assert (
        answers_of(study.folder, stage).text.tolist() == answers_of(finished, stage).text.tolist()
        and sum(asked) == len(answers_of(finished, stage)) - 8
    )


# ---- judging


def test_a_full_disk_ends_the_judging_before_more_is_paid(cut, monkeypatch):
    opened, real = [], Replies.__init__

    def small(replies, file):
        real(replies, file)
        replies.connection.execute("PRAGMA max_page_count = 8")
        opened.append(replies)

    monkeypatch.setattr(Replies, "__init__", small)
    study, stage, run, told = cut("eval-mid", "judge=paid/fine")
    HEARD.clear()
    WORKING.clear()
    with pytest.raises(InputError, match="no room left.*GB in finished stages") as error:
        run()
    paid, stored = len(HEARD), opened[0].connection.execute("SELECT count(*) FROM replies").fetchone()[0]
    assert "\n" not in str(error.value) and stored > 0 and not (study.folder / stage.place).exists()
    monkeypatch.undo()
    for replies in opened:
        replies.connection.execute("PRAGMA max_page_count = 100000")  # room again
    manifest = run()
    wanted = opened[0].connection.execute("SELECT count(*) FROM replies").fetchone()[0]
    # what was kept was not paid for again
    assert len(HEARD) - paid == wanted - stored and manifest["result"]["unjudged"] == 0
    assert stored < paid < wanted  # and the judge was not asked for all the rest


# ---- the command


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_tells_the_signal(monkeypatch, capsys, tmp_path, number, status):
    def run(*args, **kwargs):
        with signals.raise_on_signal():
            signal.raise_signal(number)

    monkeypatch.setattr(pipeline, "run", run)
    assert cli.main(["run", "--preset", "smoke", "--out", str(tmp_path / "study")]) == status
    assert "the same command carries on" in capsys.readouterr().err


def test_lines_worth_keeping_are_said(cut, finished, monkeypatch, tmp_path):
    said, passed = [], []
    study = Study(copy_study(finished, tmp_path / "study"))
    shutil.rmtree(study.folder / "seed-1" / "probe-mid")

    def run_stage(study, preset, stage, report, unsafe):
        report("step 3")
        report(Notice("carrying on from step 2 of 9"))
        shutil.copytree(finished / stage.place, study.folder / stage.place)
        return study.manifest(stage)

    monkeypatch.setattr(ray_engine, "run_stage", run_stage)
    monkeypatch.setattr(pipeline, "check_before_training", lambda *args: None)
    pipeline.run(
        load_preset("smoke", list(CRASH_SIZE)),
        study.folder,
        say=said.append,
        report=passed.append,
        page=False,
    )
    assert any("probe-mid: carrying on from step 2 of 9" in line for line in said) and any(
        "probe-mid: step 3" in line for line in passed
    )
