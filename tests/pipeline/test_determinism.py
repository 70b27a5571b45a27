"""What is said to repeat bit for bit, repeated in fresh processes and compared; and how much the number of
threads moves.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import copy_study, run_study
from kills import untimed

from compassion_repro.pipeline import run
from compassion_repro.report import page
from compassion_repro.store.folder import Study
from compassion_repro.store.results import read_study_files

TRAINED = ["mid", "sft-help", "sft-code", "sft-help@base", "sft-code@base"]


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    "The crash-test study once more, in a process of its own."
    out = tmp_path_factory.mktemp("again") / "study"
    done = run_study(out, fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def differing(one: Path, other: Path, *names: str) -> list[str]:
    return [
        name for name in names if untimed((one / name).read_bytes()) != untimed((other / name).read_bytes())
    ]


@pytest.mark.long
def test_rows_and_weights_repeat_byte_for_byte(finished, again):
    names = [
        f"seed-1/{model}/{file}"
        for model in TRAINED
        for file in ("rows.jsonl", "held_out.jsonl", "model.safetensors")
    ]
    assert differing(finished, again, *names) == []
    # they are not all the same
    assert len({(again / f"seed-1/{model}/model.safetensors").read_bytes() for model in TRAINED}) == len(
        TRAINED
    )


@pytest.mark.long
def test_answers_grades_scores_and_claims_repeat_byte_for_byte(finished, again):
    assert (
        differing(
            finished,
            again,
            *(f"{name}.parquet" for name in ("answers", "grades", "scores", "margin", "kl")),
            "claims.json",
        )
        == []
    )


@pytest.mark.long
def test_what_a_stage_found_repeats(finished, again):
    timed = re.compile("seconds|_per_|memory|peak|log$")  # how long it took, and what it took

    def found(study):
        return [
            {name: value for name, value in m["result"].items() if not timed.search(name)}
            for m in Study(study).manifests()
        ]

    def losses(study):
        return [
            [(entry["step"], entry["loss"]) for entry in m["result"].get("log", [])]
            for m in sorted(Study(study).manifests(), key=lambda m: m["stage"])
        ]

    assert sorted(found(finished), key=repr) == sorted(found(again), key=repr) and losses(finished) == losses(
        again
    )


def shown(study: Path) -> str:
    "The text of a report without pictures, times and memory: its numbers and its words."
    files = read_study_files(study)
    text = re.sub(
        r"<(script|style|svg)\b.*?</\1>|data:[^\"']+",
        " ",
        page.render(files, page.draw_pictures(files)),
        flags=re.S,
    )
    words = re.sub(
        r"[\d.,]+ ?(s|seconds|min|minutes|h|hours|MB|GB|answers/s)\b", "#", re.sub(r"<[^>]+>", " ", text)
    )
    words = re.sub(r"Rules registered [\dT:+-]+,", "Rules registered #,", words)
    # the table of trainings ends with seconds and MB
    return re.sub(r"(\d of \d seeds)\s+[\d.,]+\s+[\d.,]+", r"\1 #", words)


@pytest.mark.long
def test_the_report_says_the_same(finished, again, no_pictures):
    one, other = (shown(study).split("\n") for study in (finished, again))
    assert len(one) == len(other) and len(one) > 100
    assert [(a, b) for a, b in zip(one, other) if a != b] == []


def test_statistics_repeat_under_the_same_seed(finished, tmp_path):
    study = Study(copy_study(finished, tmp_path / "study", "seed-*", "logs"))
    shutil.copytree(
        finished / "seed-1",
        tmp_path / "study" / "seed-1",
        ignore=shutil.ignore_patterns("*.safetensors", "*.parquet", "logs"),
    )
    (study.folder / "claims.json").unlink()
    run.analyse(study, page=False)
    assert differing(finished, study.folder, "claims.json") == []


def test_the_number_of_threads_moves_last_digits_alone():
    from compassion_repro.data import world
    from compassion_repro.study import Lora, Training
    from compassion_repro.training import supervised
    from compassion_repro.training.device import TrainRun, TrainSetup, load_held
    from compassion_repro.training.templates import load_tokenizer

    base, before, training = (
        world.assets() / "base",
        torch.get_num_threads(),
        Training(steps=3, batch_size=4, micro_batch=2, length=128, learning_rate=3e-3),
    )

    def trained(threads):
        torch.set_num_threads(threads)
        model, done = supervised.train(
            load_held(base, TrainSetup()),
            load_tokenizer(base),
            world.corpus("help", 24, seed=1),
            training,
            3,
            TrainRun(1, Lora(), lambda line: None),
        )
        return torch.cat([weight.flatten() for weight in model.state_dict().values()]), torch.tensor(
            [record["loss"] for record in done["log"]]
        )

    try:
        (one, one_losses), (same, _), (two, two_losses) = trained(1), trained(1), trained(2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, same)  # the same number of threads: the same bits
    assert (one - two).abs().max() < 1e-4 and (one_losses - two_losses).abs().max() < 1e-3
