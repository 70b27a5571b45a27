"""Merges that fail their check, and surroundings that a launcher left behind: nothing that was trained is
lost.
"""

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
from cases import Case, problem, table
from conftest import CRASH_SIZE, run_study

from compassion_repro.core.errors import InputError
from compassion_repro.pipeline import run, stages
from compassion_repro.presets import load_preset
from compassion_repro.store import graph
from compassion_repro.store.folder import Study
from compassion_repro.training import merging, supervised

SMALL = [
    *CRASH_SIZE,
    "arms=[]",
    "midtrain.steps=2",
    "generation.max_new_tokens=8",
    "benchmarks.anima.size={en: 2}",
    "benchmarks.moru.size={en: 2}",
]
REAL = merging.check_merge


def wrong(count: int):
    "Stands in for the check: the first `count` ways come out half a nat off."
    seen = []

    def measured(live, merged, tolerance):
        seen.append(tolerance)
        return REAL(live, merged + 0.5 if len(seen) <= count else merged, tolerance)

    return mock.patch.object(merging, "check_merge", measured)


def no_training():
    "Any training from here on is a fault."
    return mock.patch.object(supervised, "train", side_effect=AssertionError("trained again"))


def study(folder: Path, *settings: str, lines: list | None = None):
    "Run the smallest study; gives mid's manifest."
    say = (lines if lines is not None else []).append
    done = run.run(
        load_preset("smoke", [*SMALL, *settings]), folder / "study", say=say, report=say, page=False
    )
    return next(m for m in done.manifests() if m["stage"] == "mid"), done


def mid_alone(folder: Path):
    "Run the smallest study as far as mid; gives its manifest."
    preset = load_preset("smoke", SMALL)
    made = Study.create(folder / "study", preset)
    for stage in graph.graph(preset):
        if stage.id in ("base", "mid") and not made.done(stage):
            manifest = stages.run_stage(made, preset, stage, lambda line: None)
    return manifest


def more_tolerance(folder: Path) -> str:
    "Every way fails; the same command with a larger tolerance takes the adapter without training."
    lines = []
    with wrong(9):
        try:
            study(folder)
        except InputError as error:
            refusal = str(error)
    assert "models.merge_tolerance=0.55" in refusal and "\n" not in refusal, refusal
    assert not (folder / "study" / "seed-1" / "mid").exists()
    assert (
        folder / "study" / "seed-1" / ".mid.checkpoints" / "trained" / "adapter_model.safetensors"
    ).is_file()
    with wrong(1), no_training():
        manifest, _ = study(folder, "models.merge_tolerance=0.55", lines=lines)
    assert any("only the merge is left to do" in line for line in lines), lines
    assert not list((folder / "study").glob("seed-1/.*")), "what was kept is cleared once the stage is done"
    return manifest["result"]["merge_check"]["way"]


def unmerged_to_the_end(folder: Path) -> str:
    """The exact sum is not exact enough: base and adapter are kept, an arm is trained from them, answered and
    measured.
    """
    lines = []
    with wrong(1):
        manifest, done = study(folder, "arms=[sft-help]", "sft.steps=1", lines=lines)
    place = done.folder / "seed-1" / "mid"
    assert (place / "base" / "config.json").is_file() and not (place / "config.json").exists()
    assert (place / "adapter" / "adapter_config.json").is_file()
    assert any("taken: unmerged" in line for line in lines), lines
    assert {"base", "mid", "sft-help"} == set(done.table("scores").model)
    arm = next(m for m in done.manifests() if m["stage"] == "sft-help")["result"]["merge_check"]
    assert arm["way"] == "own" and (done.folder / "seed-1" / "sft-help" / "config.json").is_file()
    kl = done.table("kl")
    assert kl[kl.model == "mid"].filter(like="kl").abs().max().max() < 1e-5
    return manifest["result"]["merge"]


def killed_in_the_merge(folder: Path) -> str:
    "A kill between training and the end of the merge costs the merge alone."
    with (
        mock.patch.object(merging, "_write", side_effect=KeyboardInterrupt),
        contextlib.suppress(KeyboardInterrupt),
    ):
        mid_alone(folder)
    with no_training():
        manifest = mid_alone(folder)
    return manifest["result"]["merge_check"]["way"]


def left_by_a_launcher(folder: Path) -> str:
    """Variables of a launcher that is gone: training must neither wait for a second process nor train in
    another way.
    """
    left = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    done = run_study(
        folder / "study",
        *SMALL,
        environment=os.environ | left | {"ACCELERATE_MIXED_PRECISION": "bf16"},
    )
    said = next((line for line in done.stdout.splitlines() if "launcher" in line), done.stderr[-500:])
    manifest = json.loads((folder / "study" / "seed-1" / "mid" / "manifest.json").read_text())
    return f"{said} -> {manifest['result']['held']['dtype']}"


CASES = [
    Case("merge every way fails, then a larger tolerance", "ok: own", more_tolerance),
    Case("merge killed before it is written", "ok: own", killed_in_the_merge),
]
FURTHER = [
    Case(
        "merge goes on unmerged to the end of the study",
        "ok: not merged: base and adapter",
        unmerged_to_the_end,
    ),
    Case(
        "environment of another launcher",
        "ok: another launcher's settings are ignored: ACCELERATE_MIXED_PRECISION, LOCAL_RANK, MASTER_.* ->"
        " float32",
        left_by_a_launcher,
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(**table(FURTHER))
def test_real_further(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong


@pytest.mark.parametrize(**table(CASES))
def test_real(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong
