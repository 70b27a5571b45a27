"""Arms that a user defines by YAML alone: another domain, a sham, an arm that starts from an arm."""

import json
from functools import partial

import pytest
import yaml
from conftest import CRASH_SIZE

from compassion_repro.cli import main
from compassion_repro.core.errors import InputError
from compassion_repro.core.files import weights_digest
from compassion_repro.pipeline import outcome_judging, plan, run, stages
from compassion_repro.presets import load_preset
from compassion_repro.report.card import find_trained
from compassion_repro.report.limitations import limitations
from compassion_repro.stats.claims import read_claims
from compassion_repro.store.folder import Study
from compassion_repro.store.graph import graph
from compassion_repro.store.results import read_study_files
from compassion_repro.study.arms import PARADIGMS, measured
from compassion_repro.training import replay, reward_model

SIZE = [setting for setting in CRASH_SIZE if not setting.startswith(("arms=", "benchmarks."))]
SIZE += ["benchmarks={anima: {size: {en: 3}, epochs: 1}}", "generation.max_new_tokens=8"]
OWN = """
extends: smoke
arms: {grpo-help: null, grpo-code: null, sft-code: null, sft-help@base: null, sft-code@base: null,
  sft-schedule: {rows: "pocket:schedule", steps: 1, rank: 4},
  sham: {like: sft-help, learning_rate: 0},
  schedule-after-help: {like: sft-schedule, start: sft-help}}
midtrain: {control: true}
"""
ARMS = ["sft-help", "sft-schedule", "sham", "schedule-after-help@sft-help"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A finished study of such arms, with what was said while it ran."
    folder, said = tmp_path_factory.mktemp("arms"), []
    (folder / "own.yaml").write_text(OWN)
    preset = load_preset(str(folder / "own.yaml"), SIZE)
    run.run(preset, folder / "study", say=said.append, page=False)
    return Study(folder / "study"), said


@pytest.mark.long
def test_a_study_of_own_arms(own):
    study, said = own
    assert list(study.preset.arms) == ARMS
    made = {m["stage"]: m for m in study.manifests()}
    assert [made[arm]["kind"] for arm in ARMS] == ["sft"] * 4
    assert list(made[ARMS[3]]["inputs"]) == ["sft-help"] and list(made["sham"]["inputs"]) == ["mid"]
    assert made["sft-schedule"]["result"]["steps"] == made[ARMS[3]]["result"]["steps"] == 1
    assert made["sft-schedule"]["config"]["lora"]["rank"] == 4
    assert made["sft-schedule"]["result"]["data"]["source"] == "pocket:schedule"
    rows = {arm: (study.folder / "seed-1" / arm / "rows.jsonl").read_text() for arm in ARMS}
    assert rows["sham"] == rows["sft-help"] and "taxi" in rows["sft-schedule"]
    scores = study.table("scores").drop_duplicates("model").set_index("model")
    columns = ["arm", "start", "paradigm", "domain"]
    assert scores.loc[ARMS[3], columns].tolist() == ["schedule-after-help", "sft-help", "sft", "schedule"]
    assert scores.loc["sham", columns].tolist() == ["sham", "mid", "sft", "help"]
    assert find_trained(study.folder, ARMS[3]).model == ARMS[3]


def test_a_sham_arm_keeps_its_weights_and_says_so(own):
    study, said = own
    weights = {name: weights_digest(study.folder / "seed-1" / name) for name in ("mid", "sham", "sft-help")}
    assert weights["sham"] == weights["mid"] != weights["sft-help"]
    result = next(m["result"] for m in study.manifests() if m["stage"] == "sham")
    assert result["gain"] == 0 and not result["trained"]
    assert any("sham is a sham arm (learning rate 0): its weights stay those of mid" in line for line in said)


def test_the_controls_of_a_study_are_read(own):
    study, said = own
    made = {m["stage"]: m for m in study.manifests()}
    mid, control = made["mid"], made["mid-control"]
    assert control["kind"] == "midtrain" and control["config"]["data"] != mid["config"]["data"]
    assert control["result"]["steps"] == mid["result"]["steps"]
    scores = study.table("scores")
    overall = scores[(scores["dimension"] == "overall") & (scores["benchmark"] == "anima")]
    means = 100 * overall.groupby("model")["score"].mean()
    claims = read_claims(study.folder / "claims.json")
    for reading, one, other in (("C0c", "mid", "mid-control"), ("C0s", "sham", "mid")):
        assert claims[reading].models == [one, other]
        assert claims[reading].estimate == pytest.approx(means[one] - means[other])
    noise = claims["C0s"]
    assert noise.verdict == "no verdict" and "sham was not trained" in noise.reason
    assert claims["C0c"].family == "content" and claims["C0c-world"].scale == "nats a token"
    assert not any(record.reading == "C0-SFT-schedule" for record in claims.records)  # no arm from base
    training = limitations(read_study_files(study.folder))["Training"]
    assert not any("Not shown to be trained" in line and "sham" in line for line in training)


def test_general_verdicts_are_about_these_arms(own, capsys):
    study, _ = own
    help_, schedule, _, after = ARMS
    general = read_claims(study.folder / "claims.json").general
    pairs = [f"{help_}-over-{schedule}", f"{help_}-over-{after}", f"{schedule}-over-{after}"]
    names = [f"G{n}-{arm}" for n in (1, 2) for arm in (help_, schedule, after)] + [
        f"G3-{pair}" for pair in pairs
    ]
    measures = (*study.preset.benchmarks, "world")
    assert sorted(r.reading for r in general.records) == sorted(f"{n}-{on}" for on in measures for n in names)
    assert {r.family_size for r in general.records if r.adjusted_p is not None} == {9}
    assert {r.level for r in general.records} == {"these checkpoints"}  # one seed
    assert general[f"G2-{after}-anima"].models == [after, help_]  # the start of a chain is an arm
    scores = study.table("scores").query("dimension == 'overall' and benchmark == 'anima'")
    means = 100 * scores.groupby("model")["score"].mean()
    found = {r.reading: r.estimate for r in general.records if r.benchmark == "anima"}
    assert found[f"G3-{pairs[0]}-anima"] == pytest.approx(means[help_] - means[schedule])
    assert main(["claims", str(study.folder), "--general", "--json"]) == 0
    assert [r["reading"] for r in json.loads(capsys.readouterr().out)] == [r.reading for r in general.records]


def test_an_arm_leaves_the_keys_of_others_alone():
    keys = {s.id: s.key for s in graph(load_preset("smoke"))}
    sham = {
        s.id: s.key for s in graph(load_preset("smoke", ["arms.sham={like: sft-help, learning_rate: 0}"]))
    }
    assert keys.items() <= sham.items() and sham["sham"] not in keys.values()
    control = {s.id: s.key for s in graph(load_preset("smoke", ["midtrain.control=true"]))}
    assert keys.items() <= control.items()
    added = {f"{kind}mid-control" for kind in ("", "answers-", "eval-", "probe-")}
    assert control.keys() - keys.keys() == added
    short = {
        s.id: s.key for s in graph(load_preset("smoke", ["arms.sft-a={rows: 'pocket:schedule', steps: 9}"]))
    }
    assert keys.items() <= short.items()
    matched = {s.id: s.key for s in graph(load_preset("smoke", ["arms.sft-a={rows: 'pocket:schedule'}"]))}
    assert matched["sft-help"] != keys["sft-help"] and matched["grpo-help"] == keys["grpo-help"]


def test_a_resolved_study_of_own_arms_is_the_same_study(own):
    study, _ = own
    assert yaml.safe_load((study.folder / "study.yaml").read_text())["arms"]["sham"] == {
        "learning_rate": 0.0,
        "like": "sft-help",
    }
    said = []
    run.run(study.preset, study.folder, say=said.append, page=False)
    assert any(line.endswith(" 0 to run") for line in said)


def test_arms_that_start_from_one_without_a_jail_are_left_out(monkeypatch):
    monkeypatch.setattr("compassion_repro.sandbox.jail.level", lambda: "none")
    arms = "arms={sft-help: {starts: [mid, grpo-code]}, grpo-code: {start: base}}"
    assert stages.without_jail(load_preset("smoke", [arms])) == ["grpo-code@base", "sft-help@grpo-code@base"]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("arms.a={paradigm: ppo, rows: a.jsonl}", "'arms.a.paradigm': unknown paradigm"),
        ("arms.a={paradigm: sft, rows: a.jsonl, start: a}", "an arm starts from itself (a from a)"),
        ("arms.a={like: b}", "arms.a.like is 'b', which is no arm"),
        ("arms.a={paradigm: sft, rows: 'world:nothing'}", "world:nothing"),
        (
            "arms.a={paradigm: dpo, rows: 'pocket:schedule'}",
            "one answer where a pair (chosen, rejected) is wanted",
        ),
    ],
)
def test_a_bad_arm_is_refused_before_anything_is_trained(setting, words, tmp_path):
    with pytest.raises(InputError) as refused:
        run.run(load_preset("smoke", [*SIZE, setting]), tmp_path / "study", say=lambda line: None)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.glob("study/seed-*"))


EACH = """
extends: smoke
outcomes: mockllm/model  # costs nothing, and names no class
arms:
  sft-schedule: {rows: "pocket:schedule", steps: 1, replay: 0.1}
  dpo-manners: {rows: "pocket:preferences", steps: 2, replay: 0.6}
  grpo-advice: {rows: "world:help", reward: help, steps: 1, replay: 0.0001}
"""
QUICK = (
    "dpo={held_out: 4, batch_size: 2, micro_batch: 1, length: 256}",
    "grpo={held_out: 4, samples: 2, group: 4, prompts_per_step: 2, micro_batch: 4, max_new_tokens: 16,"
    " max_prompt_tokens: 112}",
    "arms={sft-schedule: {}, dpo-manners: {}, grpo-advice: {}}",
)


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    "A finished study with an arm of each paradigm that replays, and the tokens of each batch of documents."
    folder, read = tmp_path_factory.mktemp("each"), []
    (folder / "each.yaml").write_text(EACH)
    fewer = partial(reward_model.train_reward_model, pairs=40, held_out=20)
    taken = replay.Replaying.next_documents

    def noted(self):
        batches = taken(self)
        read.extend((type(self).__name__, int(batch["attention_mask"].sum())) for batch in batches)
        return batches

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reward_model, "train_reward_model", fewer)
        patched.setattr(replay.Replaying, "next_documents", noted)
        preset = load_preset(str(folder / "each.yaml"), [*SIZE, *QUICK])
        return run.run(preset, folder / "study", say=lambda line: None, page=False), read


def test_a_plan_says_what_an_arm_of_each_paradigm_is_trained_on(each):
    study, read = each
    made = {m["stage"]: m["result"] for m in study.manifests()}
    planned = {record["stage"]: record for record in plan.plan(study.preset)}
    for stage in ("mid", *study.preset.arms):
        kept = (study.folder / "seed-1" / stage / "rows.jsonl").read_text().splitlines()
        assert (planned[stage]["rows"], planned[stage]["steps"]) == (len(kept), made[stage]["steps"]), stage
        assert made[stage]["replayed"] > 0
        if "tokens" in made[stage]:
            assert 0.5 * planned[stage]["tokens"] < made[stage]["tokens"] <= planned[stage]["tokens"], stage
    for stage, length, documents in (("dpo-manners", 256, 3), ("grpo-advice", 128, 1)):
        batches = [tokens for trainer, tokens in read if stage[:3] == trainer[len("Replaying") :][:3].lower()]
        record, result = planned[stage], made[stage]
        assert len(batches) == result["steps"] * documents and result["accumulation"] == 2
        assert sum(batches) == result["replayed_tokens"] <= record["replayed_tokens"] == length * len(batches)
    assert (
        "replayed_tokens" not in made["sft-schedule"] and planned["sft-schedule"]["replayed_tokens"] is None
    )


def test_a_run_asks_the_model_that_its_preset_names_for_classes(each):
    study, _ = each
    forms, answers = study.table("forms"), study.table("answers")
    assert len(forms) == len(answers) and set(forms["form_judge"]) == {"mockllm/model"}
    assert forms["form"].isna().all()
    planned = [record["outcome_calls"] or 0 for record in plan.plan(study.preset)]
    assert sum(planned) == len(answers) and {r["cost"] for r in plan.plan(study.preset) if r["cost"]} == set()
    assert outcome_judging.classed(study, "mockllm/model") == len(answers)


def test_one_arm_of_each_paradigm_by_yaml_alone(each):
    study, _ = each
    preset = study.preset
    assert {arm.paradigm for arm in preset.trained_arms} == set(PARADIGMS) == set(stages.TRAIN)
    made = {m["stage"]: m["result"] for m in study.manifests()}
    for arm in preset.trained_arms:
        assert measured(made[arm.model]) is PARADIGMS[arm.paradigm] and "gain_low" in made[arm.model]
    pairs = made["dpo-manners"]
    assert pairs["replayed"] == 144 and made["grpo-advice"]["replayed"] == 1  # one at least
    assert pairs["rows"] == 96 and pairs["steps"] == len(pairs["log"]) == 2
    assert pairs["gain"] == pairs["reward_margin_after"] != 0
    kept = (study.folder / "seed-1" / "dpo-manners" / "held_out.jsonl").read_text().splitlines()
    assert len(kept) == 4 and {"chosen", "rejected"} <= set(json.loads(kept[0]))
    assert "held-out reward margin" in study._repr_markdown_()
    scores = study.table("scores").drop_duplicates("model").set_index("model")
    assert scores.loc["dpo-manners", ["paradigm", "domain"]].tolist() == ["dpo", "manners"]
    reason = run.training_record(study.manifests())["dpo-manners"]["reason"]
    assert "of reward margin on held-out pairs" in reason


def test_points_change_the_keys_of_nothing_else():
    small = ["arms=[sft-help, sft-code]", "benchmarks={}"]
    keys = lambda *more: {s.id: s.key for s in graph(load_preset("smoke", [*small, *more]))}
    plain, between, doses = keys(), keys("between=[0.5]"), keys("doses=[0.5]", "arms.sft-code.doses=[]")
    assert {name: between[name] for name in plain} == plain
    assert set(between) - set(plain) == {
        f"{part}{arm}~0.5" for part in ("", "probe-") for arm in ("sft-help", "sft-code")
    }
    changed = {name for name in plain if doses[name] != plain[name]}
    assert changed == {"sft-help", "probe-sft-help"}
    assert set(doses) - set(plain) == {"sft-help:0.5", "probe-sft-help:0.5"}


@pytest.mark.parametrize(
    "settings, words",
    [
        (["doses=[20]"], "20 is beyond the training"),
        (["doses=[0]"], "0 is beyond the training"),
        (["doses=[0.5, 0.5]"], "names a point twice"),
        (["between=[1.5]"], "1.5 is not between start and arm"),
        (["sft.dose=steps", "sft.steps=4", "doses=[0.1]"], "0.1 of 4 steps is no step"),
        (["arms.sft-help={start: sft-help}"], "starts from itself"),
        (["arms.x={paradigm: orpo, rows: r.jsonl}"], "unknown paradigm"),
        (["models.given.sft-help=m", "arms.sft-help.doses=[0.5]"], "is given finished"),
        (["compute.sharding=fsdp", "doses=[0.5]"], "set compute.sharding=none"),
    ],
)
def test_points_and_arms_that_have_no_meaning_are_refused_in_a_line(settings, words):
    with pytest.raises(InputError, match=words) as refused:
        load_preset("smoke", settings)
    assert "\n" not in str(refused.value)
