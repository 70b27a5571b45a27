"""The GRPO arms in a study: through the graph, with crossed rewards, and where the machine has no jail."""
import json

import pandas as pd
import pytest
from conftest import CRASH_SIZE, assert_one_line, run_study

from compassion_repro import pipeline, sandbox, stats
from compassion_repro.pipeline import Study
from compassion_repro.study import InputError, load_preset

ARMS = ["grpo-help", "grpo-code", "grpo-code+help"]


@pytest.mark.skipif(sandbox.level() == "none", reason="no jail on this machine")
def test_grpo_arms_join_the_study(tmp_path):
    out = tmp_path / "study"
    done = run_study(out, f"arms=[{', '.join(ARMS)}]", "grpo.steps=1", "grpo.held_out=4")
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = {m["stage"]: m["result"] for m in Study(out).manifests()}
    assert manifests["reward"]["accuracy"] > 0.7
    for arm in ARMS:
        result, place = manifests[arm], out / "seed-1" / arm
        assert {"reward_before", "reward_after", "gain_low", "trained", "log"} <= set(result) and result["steps"] == len(result["log"]) == 1
        assert {"rows.jsonl", "completions.parquet", "held_out.parquet", "model.safetensors"} <= {p.name for p in place.iterdir()}
        assert len(pd.read_parquet(place / "completions.parquet")) > 0
    assert manifests["grpo-code"]["jail"].startswith(sandbox.level())
    assert set(Study(out).table("scores").model.unique()) == {"base", "mid", *ARMS}
    verdicts = {r["reading"]: r["verdict"] for r in json.loads((out / "claims.json").read_text())}
    assert verdicts["C2"] != "not tested" and verdicts["C1"] == "not tested"
    again = run_study(out, f"arms=[{', '.join(ARMS)}]", "grpo.steps=1", "grpo.held_out=4")
    assert "21 done, 0 to run" in again.stdout


def test_without_a_jail_the_code_arms_are_left_out(monkeypatch):
    preset = load_preset("tiny", ["arms=[sft-code, grpo-help, grpo-code, grpo-help+code]"])
    monkeypatch.setattr(sandbox, "level", lambda: "none")
    assert pipeline.without_jail(preset) == ["grpo-code", "grpo-help+code"]
    assert pipeline.without_jail(preset, unsafe=True) == []
    monkeypatch.setattr(sandbox, "level", lambda: "landlock")
    assert pipeline.without_jail(preset) == []


def test_without_a_jail_the_rest_of_the_study_finishes(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(sandbox, "level", lambda: "none")
    preset = load_preset("smoke", [*CRASH_SIZE, "arms=[sft-code, grpo-code]"])
    study = pipeline.run(preset, tmp_path / "study", say=said.append)
    assert any("grpo-code are left out" in line for line in said)
    assert set(study.table("scores").model.unique()) == {"base", "mid", "sft-code"}
    assert stats.read_claims(study.folder / "claims.json")["C2"].verdict == "not tested"


def test_pairs_that_make_no_sense_are_refused(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Question {n}?", "response": "An answer."}) + "\n" for n in range(9)))
    assert_one_line(run_study(tmp_path / "study", f"data.grpo-help={rows}", "arms=[grpo-help]"), "knows only the miniature world")
    assert_one_line(run_study(tmp_path / "study", "models.reward=world:nothing", "arms=[grpo-help]"), "world:nothing")


def test_unknown_crossings_are_no_arms():
    with pytest.raises(InputError, match="unknown model"): load_preset("tiny", ["arms=[sft-help+code]"])
