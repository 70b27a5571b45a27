"""The GRPO arms in a study: through the graph, with crossed rewards, and where the machine has no jail."""

import json
import shutil
from functools import partial

import pandas as pd
import pytest
from conftest import CRASH_SIZE, copy_study

from compassion_repro.core.errors import InputError
from compassion_repro.pipeline import run, stages
from compassion_repro.presets import load_preset
from compassion_repro.sandbox import jail
from compassion_repro.stats.claims import read_claims
from compassion_repro.store import graph
from compassion_repro.store.folder import Study
from compassion_repro.store.manifest import stage_facts
from compassion_repro.training import reward_model

ARMS = ["grpo-help", "grpo-code", "grpo-help+code"]

QUICK = [
    "grpo.held_out=4",
    "grpo.samples=2",
    "grpo.group=4",
    "grpo.prompts_per_step=4",
    "grpo.micro_batch=16",
    "grpo.max_new_tokens=32",
]


def crash_preset(*more):
    return load_preset("smoke", [*CRASH_SIZE, *more])


@pytest.mark.skipif(jail.level() == "none", reason="no jail on this machine")
@pytest.mark.long
def test_grpo_arms_join_the_study(monkeypatch, finished, tmp_path):
    said, out = [], tmp_path / "study"
    preset = crash_preset(f"arms=[{', '.join(ARMS)}]", *QUICK, "grpo.steps=1")
    Study.create(out, preset)
    # base and mid, with their answers and scores, are the same stages in any study
    for stage in graph.graph(preset):
        if stage.model in ("base", "mid"):
            shutil.copytree(finished / stage.place, out / stage.place)
    # how good it becomes is the notebook's matter
    monkeypatch.setattr(
        reward_model, "train_reward_model", partial(reward_model.train_reward_model, pairs=40, held_out=20)
    )
    run.run(preset, out, say=said.append, page=False)
    assert "21 stages, 8 done, 13 to run" in said[0]
    manifests = {m["stage"]: m["result"] for m in Study(out).manifests()}
    assert manifests["reward"]["held_out_pairs"] == 20 and 0 <= manifests["reward"]["accuracy"] <= 1
    for arm in ARMS:
        result, place = manifests[arm], out / "seed-1" / arm
        assert {"reward_before", "reward_after", "gain_low", "trained", "log"} <= set(result) and result[
            "steps"
        ] == len(result["log"]) == 1
        assert {"rows.jsonl", "completions.parquet", "held_out.parquet", "model.safetensors"} <= {
            p.name for p in place.iterdir()
        }
        assert len(pd.read_parquet(place / "completions.parquet")) > 0
    assert manifests["grpo-code"]["jail"].startswith(jail.level())
    assert set(Study(out).table("scores").model.unique()) == {"base", "mid", *ARMS}
    verdicts = {r["reading"]: r["verdict"] for r in json.loads((out / "claims.json").read_text())}
    assert verdicts["C2"] != "not tested" and verdicts["C1"] == "not tested"
    crossed = manifests["grpo-help+code"]
    assert (
        any("neither unit tests nor a reference" in line for line in crossed["warnings"])
        and not crossed["trained"]
    )
    assert [line for line in said if "ask for no code" in line] == [
        next(line for line in said if line.startswith("warning: grpo-help+code: "))
    ]
    assert "(not trained); warning: before training the reward is 0" in Study(out)._repr_markdown_()
    run.run(preset, out, say=said.append, page=False)
    assert any("21 done, 0 to run" in line for line in said)


def grpo_stage():
    "A GRPO arm whose earlier stages the finished study holds."
    preset = crash_preset("arms=[grpo-code]", *QUICK, "grpo.steps=4", "grpo.save_every=1")
    return preset, next(stage for stage in graph.graph(preset) if stage.id == "grpo-code")


@pytest.mark.skipif(jail.level() == "none", reason="no jail on this machine")
@pytest.mark.long
def test_a_stage_cut_off_carries_on_and_ends_the_same(finished, tmp_path):
    ends = {}
    for name in ("whole", "cut"):
        study = Study(copy_study(finished, tmp_path / name))
        preset, stage = grpo_stage()
        place, told = study.folder / stage.place, []
        hidden = place.with_name(f".{place.name}.checkpoints")

        def report(line):
            told.append(line)
            if (
                "step 3/4" in line
                and name == "cut"
                and len(told) < 100
                and not any("carrying on" in said for said in told)
            ):
                raise KeyboardInterrupt

        if name == "cut":
            with pytest.raises(KeyboardInterrupt):
                stages.run_stage(study, preset, stage, report)
            assert hidden.is_dir() and not place.exists()
            assert {m["stage"] for m in study.manifests()} == {
                m["stage"] for m in Study(finished).manifests()
            }
            study = Study(study.folder.rename(tmp_path / "moved"))  # another place, as on another machine
        manifest = stages.run_stage(study, preset, stage, report)
        place = study.folder / stage.place
        assert not place.with_name(f".{place.name}.checkpoints").exists() and study.done(stage)
        log = [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in manifest["result"]["log"]
        ]
        ends[name] = (
            log,
            [(place / file).read_bytes() for file in ("model.safetensors", "held_out.jsonl")],
            pd.read_parquet(place / "completions.parquet"),
        )
        if name == "cut":
            assert any("carrying on from step" in line for line in told)
    assert ends["whole"][:2] == ends["cut"][:2] and ends["whole"][2].equals(ends["cut"][2])


def test_warnings_and_abstentions_stand_in_the_table():
    result = {
        "rows": 9,
        "steps": 2,
        "completions": 18,
        "reward_before": 0.25,
        "reward_after": None,
        "abstained": 0.125,
        "warnings": ["most groups had no variance"],
        "trained": False,
    }
    facts = stage_facts({"result": result})
    assert "0.250 → unknown (not trained), abstained on 12%; warning: most groups had no variance" in facts
    assert (
        run.training_record([{"model": "grpo-code", "result": {**result, "gain": None, "gain_high": None}}])[
            "grpo-code"
        ]["trained"]
        is False
    )


def test_without_a_jail_the_code_arms_are_left_out(monkeypatch):
    preset = load_preset("tiny", ["arms=[sft-code, grpo-help, grpo-code, grpo-help+code]"])
    monkeypatch.setattr(jail, "level", lambda: "none")
    assert stages.without_jail(preset) == ["grpo-code", "grpo-help+code"]
    assert stages.without_jail(preset, unsafe=True) == []
    monkeypatch.setattr(jail, "level", lambda: "landlock")
    assert stages.without_jail(preset) == []


def test_without_a_jail_the_rest_of_the_study_finishes(monkeypatch, finished, tmp_path):
    said = []
    monkeypatch.setattr(jail, "level", lambda: "none")
    study = Study.create(tmp_path / "study", preset := crash_preset("arms=[sft-code, grpo-code]"))
    for stage in graph.graph(preset):
        if stage.model in ("base", "mid", "sft-code"):
            shutil.copytree(finished / stage.place, study.folder / stage.place)
    run.run(preset, study.folder, say=said.append, page=False)
    assert any("grpo-code are left out" in line for line in said)
    assert set(study.table("scores").model.unique()) == {"base", "mid", "sft-code"}
    assert read_claims(study.folder / "claims.json")["C2"].verdict == "not tested"


def test_pairs_that_make_no_sense_are_refused(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"Question {n}?", "response": "An answer."}) + "\n" for n in range(9)
        )
    )
    for change, words in (
        (f"data.grpo-help={rows}", "knows only the miniature world"),
        ("models.reward=world:nothing", "world:nothing"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            run.run(crash_preset(change, "arms=[grpo-help]"), tmp_path / words, say=lambda line: None)
        assert "\n" not in str(refused.value) and not list((tmp_path / words).glob("seed-*"))


def test_unknown_crossings_are_no_arms():
    with pytest.raises(InputError, match="unknown model"):
        load_preset("tiny", ["arms=[sft-help+code]"])
