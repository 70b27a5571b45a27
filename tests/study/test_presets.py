"""The presets at scale: what they cost by the plan's own estimate, the one-word switches, whether a machine
fits them, and what is told where one does not, or where a preset or a model is broken.
"""

import json
import re
import shutil
import types
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
import torch
from conftest import assert_one_line, settings
from pydantic import BaseModel

from compassion_repro import cli
from compassion_repro.cli.preset_file import preset_template
from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.data.sources import parse_source
from compassion_repro.data.values import find_value
from compassion_repro.evaluation import cost
from compassion_repro.pipeline import machine, plan, preflight, stages
from compassion_repro.pipeline import run as pipeline
from compassion_repro.presets import build_preset, load_preset, with_settings
from compassion_repro.store.folder import Study
from compassion_repro.store.graph import graph, source_digest
from compassion_repro.study import Preset, check_judge
from compassion_repro.training import gpu_hours, memory

SCALE = ("paper", "colab", "released")
BASE = world.assets() / "base"
KEYS = frozenset({"HF_TOKEN", "GOOGLE_API_KEY"})
T4 = machine.Machine(12.7, 70, "Tesla T4", 14.7, False, "landlock", KEYS)
H100 = machine.Machine(220, 900, "NVIDIA H100", 79.2, True, "bubblewrap", KEYS)


def refused(capsys, *words):
    "The one line of a refused command."
    status = cli.main(list(words))
    line = capsys.readouterr().err
    assert_one_line(types.SimpleNamespace(returncode=status, stderr=line))
    return line


# --- what the presets cost
# ------------------------------------------------------------------------------------------------------------------


def test_colab_takes_at_most_three_hours_on_a_t4_and_fits_it_evaluation_included():
    preset = load_preset("colab")
    records = plan.plan(preset)
    found = plan.on_machines(preset, records)["T4"]
    # nothing is left out of the sum
    assert {r["kind"] for r in records} == {
        "base",
        "midtrain",
        "reward",
        "sft",
        "grpo",
        "answers",
        "eval",
        "probe",
    }
    assert (
        sum(found["stages"]) <= 3
        and found["hours"] == round(sum(found["stages"]), 1)
        and all(hours > 0 for hours in found["stages"])
    )
    assert set(found["memory"]) == {"midtrain", "sft", "grpo", "answers"} and all(
        fit.gb <= memory.SHARE * 14.7 for fit in found["memory"].values()
    )
    # no T4 was at hand: half of what an H100 reached
    assert (
        plan.planned_gpu(preset) == "T4"
        and gpu_hours.GPUS["T4"].trust == 0.5
        and not gpu_hours.GPUS["T4"].bfloat16
    )
    assert all(r["judge_calls"] > 1000 for r in records if r["kind"] == "eval")
    assert (
        preset.models.quantize == "nf4" and preset.compute.device == "cuda" and preset.models.dtype == "auto"
    )
    assert memory.read_shape(preset.models.reward).parameters < 1e9 and all(
        r["rows"] <= 600 for r in records if r["rows"]
    )


@pytest.mark.parametrize("name", ["paper", "colab"])
def test_the_effective_batch_is_the_same_on_every_device(name):
    preset, (shape, reward) = load_preset(name), plan.shapes(load_preset(name))
    assert {preset.midtrain.micro_batch, preset.sft.micro_batch, preset.grpo.micro_batch} == {"auto"}
    chosen = {}
    for gpu in gpu_hours.GPUS.values():
        for kind, whole in (
            ("midtrain", preset.midtrain.batch_size),
            ("sft", preset.sft.batch_size),
            ("grpo", preset.grpo.completions),
        ):
            fit = memory.stage_memory(preset, kind, shape, gpu.gb, "cuda", reward)
            assert whole % (fit.at_once or whole) == 0 and (fit.at_once or whole) % fit.micro_batch == 0
            training = getattr(preset, kind).model_copy(update={"micro_batch": fit.micro_batch})
            assert training.accumulation * training.micro_batch == whole
            chosen.setdefault(kind, set()).add(fit.micro_batch)
    assert all(len(sizes) > 1 for sizes in chosen.values())  # what gives is the micro-batch
    keys = [
        [stage.key for stage in graph(with_settings(preset, [f"compute.memory_gb={gb}"]))]
        for gb in (14.7, 79.2)
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "name, switch, told",
    [
        (
            "colab",
            "models.base=meta-llama/Llama-3.1-8B",
            lambda p: plan.shapes(p)[0].parameters == 8_030_261_248 and plan.planned_gpu(p) == "L4",
        ),
        ("colab", "models.base=unsloth/Llama-3.2-1B", lambda p: plan.planned_gpu(p) == "T4"),
        (
            "paper",
            "sft.dose=full",
            lambda p: (
                [r["steps"] for r in plan.plan(p) if r["stage"] in ("sft-help", "sft-code")] == [91, 1694]
            ),
        ),
        (
            "paper",
            "models.quantize=nf4",
            lambda p: plan.planned_memory(p)["sft"].parts["weights"] < 6 * 2**30,
        ),
        (
            "paper",
            "models.base=unsloth/Meta-Llama-3.1-8B",
            lambda p: plan.planned_memory(p) == plan.planned_memory(load_preset("paper")),
        ),
        (
            "released",
            "arms=[sft-help, sft-code, grpo-help, grpo-code]",
            lambda p: p.trained == ("sft-help", "sft-code"),
        ),
    ],
)
def test_each_switch_is_one_setting_that_the_preset_file_tells(name, switch, told):
    from compassion_repro.presets import _preset_text

    assert f"--set {switch}" in _preset_text(name)
    assert told(load_preset(name, [switch]))


@pytest.mark.parametrize("name", ["paper", "colab", "released", "tiny"])
def test_a_plan_prints_its_parts_within_a_hundred_columns(name, capsys):
    assert cli.main(["plan", "--preset", name]) == 0
    out = capsys.readouterr().out
    tables = out[out.index("\nstages:") :]
    assert all(len(line) <= 100 for line in tables.splitlines()), max(tables.splitlines(), key=len)
    stages = tables.splitlines()[2]  # the heading; a column without a value is left out
    trained = ("rows", "steps", "tokens")
    assert [word for word in trained if word in stages] == ([] if name == "released" else [*trained])
    for word in ("answers", "judge calls", "cost, $"):
        assert word in stages, word
    for word in ("weights", "cache", "downloads", "checkpoints"):
        assert word in tables, word
    assert all((word in tables) == (name != "released") for word in ("adapter", "optimiser", "activations"))
    assert ("T4" in tables and "H100" in tables and "of the data sheet's arithmetic" in tables) == (
        name != "tiny"
    )
    assert ("for the judge" in tables) == (name != "tiny")
    if name == "colab":
        assert re.search(r"in all +2\.\d+ ", tables) and re.search(r"fits +yes +yes +yes", tables)


def test_costs_follow_the_price_table(tmp_path, capsys):
    prices = tmp_path / "prices.yaml"
    prices.write_text("google/gemini-2.5-flash-lite: {input: 1.0, output: 4.0}\n")
    dear = [
        sum(r["cost"] or 0 for r in plan.plan(load_preset("colab"), 1, table))
        for table in (None, cost.load_prices(prices))
    ]
    assert dear[1] == pytest.approx(10 * dear[0]) and dear[0] > 0
    assert (
        cli.main(["plan", "--preset", "colab", "--prices", str(prices)]) == 0
        and f"about ${dear[1]:,.2f} for the judge" in capsys.readouterr().out
    )
    # no price is no zero
    assert all(
        r["cost"] is None for r in plan.plan(load_preset("colab", ["judge=own/model"])) if r["kind"] == "eval"
    )


# --- the template of published checkpoints
# ----------------------------------------------------------------------------------------------------


def stand_in(folder, template):
    "A model folder whose tokenizer has a chat template, or has none."
    shutil.copytree(BASE, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"})
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "base, given, template, others",
    [
        (True, (True, True), "own", ()),
        (False, (True, True), "each", ()),
        (False, (True, False), "plain", ("raw", "user")),
        (False, (), "plain", ("raw", "user")),
        (True, (), "own", ()),
    ],
)
def test_the_form_of_the_questions_is_settled_from_the_tokenizers(tmp_path, base, given, template, others):
    source = stand_in(tmp_path / "base", "{{ messages[0].content }}" if base else None)
    models = {
        f"models.given.{name}": stand_in(tmp_path / name, "{{ messages[0].content }}" if own else None)
        for name, own in zip(("mid", "sft-help"), given)
    }
    preset = load_preset(
        "smoke",
        [
            "arms=[sft-help]",
            "generation.template=auto",
            f"models.base={source}",
            *(f"{key}={folder}" for key, folder in models.items()),
        ],
    )
    settled = pipeline.choose_template(preset)
    assert (settled.generation.template, settled.generation.templates) == (template, others)
    assert pipeline.choose_template(settled) is settled and {s.id for s in graph(settled)} <= {
        s.id for s in graph(preset)
    }
    assert settled.models_compared == preset.models_compared


def test_released_leaves_the_template_to_the_checkpoints_and_plans_for_the_dearest():
    preset = load_preset("released")
    assert (
        preset.generation.template == "auto"
        and preset.generation.forms() == ["plain", "raw", "user"]
        and preset.trained == ()
    )
    assert {s.kind for s in graph(preset)} == {"base", "answers", "eval", "probe"}


# --- does a machine fit
# -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "here, name, words",
    [
        (
            replace(T4, gpu=None, gpu_gb=0.0),
            "colab",
            ["no GPU", "15 GB (T4 or larger)", "compute.device=cpu"],
        ),
        (T4, "paper", ["needs 32 GB and the GPU has 15", "--set models.base=meta-llama/Llama-3.2-1B"]),
        (T4, "released", ["take one of at least 17 GB, with --set generation.batch_size=4"]),
        (T4, "colab", ["yes", "about 2.6 hours", "no bfloat16, so float16 with scaled losses"]),
        (H100, "paper", ["yes", "about 18 hours by the plan's estimate"]),
        (
            replace(H100, gpu="another"),
            "paper",
            ["yes", "meta-llama/Llama-3.1-8B comes from the hub, which was not asked"],
        ),
        (T4, "pocket", ["yes", "nothing is missing here; HuggingFaceTB/SmolLM2-135M-Instruct comes from"]),
        (T4, "tiny", ["yes", "everything is here"]),
        (replace(H100, gpu_gb=24.0), "paper", ["--set models.quantize=nf4 --set generation.batch_size=16"]),
        (replace(H100, gpu_gb=32.0), "paper", ["--set models.quantize=nf4"]),
        (
            replace(H100, gpu_gb=22.2),
            "paper",
            [
                "--set models.quantize=nf4 --set generation.batch_size=16 --set models.reward=Skywork",
                "which is another study",
            ],
        ),
        (
            replace(H100, disk_gb=100),
            "paper",
            ["of disk and 100 are free", "--set 'arms=[sft-help, sft-code]'"],
        ),
        (
            replace(T4, tokens=frozenset()),
            "colab",
            ["no HF_TOKEN", "--set models.base=unsloth/Llama-3.2-1B", "no GOOGLE_API_KEY", "--set judge="],
        ),
        (
            replace(H100, missing=("trl", "google")),
            "paper",
            ["trl is missing: pip install", "pip install '.[judge]'"],
        ),
        (replace(H100, jail="none"), "paper", ["yes", "grpo-code will be left out", "--allow-unsafe-code"]),
        (replace(H100, memory_gb=2), "tiny", ["working memory", "2"]),
    ],
)
def test_doctor_tells_what_to_change_in_a_line(here, name, words, monkeypatch, capsys):
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": here)
    status = cli.main(["doctor", "--preset", name])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{name:9} {'no' if status else 'yes'}") and (status == 0) == ("yes" in words), (
        line
    )
    for word in words:
        assert word in line, line


def test_doctor_holds_every_preset_against_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": T4)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[lines.index("does this machine fit?") + 1 :]] == [
        ["colab", "yes"],
        ["paper", "no"],
        ["pocket", "yes"],
        ["released", "no"],
        ["smoke", "yes"],
        ["tiny", "yes"],
    ]
    assert "--set changes one preset" in refused(capsys, "doctor", "--set", "lora.rank=8")


# --- too little of a machine, told when a study starts
# ------------------------------------------------------------------------------------------


def test_a_gpu_that_is_too_small_is_told_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": replace(T4, gpu_gb=0.001))
    # as if there were a GPU
    monkeypatch.setattr("compassion_repro.training.processes.check", lambda preset: None)
    said, study = (
        [],
        Study.create(
            tmp_path / "study",
            preset := load_preset("smoke", ["compute.device=cuda", "models.base=nobody/nothing here"]),
        ),
    )
    monkeypatch.setattr(plan, "shapes", lambda preset: (memory.read_shape(BASE), None))
    with pytest.raises(InputError, match="nothing here"):
        preflight.check_before_training(study, preset, said.append)
    assert (
        len(said) == 2
        and said[0].startswith("warning: by the plan's estimate, the stage ")
        and "the GPU has 0" in said[0]
    )


def test_no_gpu_for_a_preset_that_demands_one(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "demands a GPU (compute.device=cuda)" in refused(
        capsys, "run", "--preset", "smoke", "--out", str(tmp_path / "study"), *settings("compute.device=cuda")
    )


@pytest.mark.parametrize(
    "kind, words",
    [
        ("answers", "lower generation.batch_size"),
        ("probe", "lower margin.batch_tokens"),
        ("base", "take a smaller model"),
    ],
)
def test_want_of_memory_outside_of_training_is_one_line(kind, words):
    def runs_out(work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB\nand more")

    def breaks(work):
        raise KeyError("other")

    work = types.SimpleNamespace(stage=types.SimpleNamespace(id=f"{kind}-mid", kind=kind))
    with pytest.raises(InputError, match=f"{kind}-mid: out of memory on this device: {words}") as caught:
        stages._advising(runs_out)(work)
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError):
        stages._advising(breaks)(work)


# --- broken models and presets
# --------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_end_and_a_reward_model_without_a_head(capsys, tmp_path):
    def run(*words):
        return refused(
            capsys, "run", "--preset", "smoke", "--out", str(tmp_path / "study"), *settings(*words)
        )

    bare = shutil.copytree(BASE, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    assert "has no end token" in run(f"models.base={bare}")
    assert "would be random numbers" in run(
        f"models.reward={BASE}", "arms=[grpo-help]", "data.grpo-help=" + str(prompts(tmp_path))
    )


def prompts(folder):
    file = folder / "prompts.jsonl"
    file.write_text(
        "".join(
            json.dumps({"instruction": f"Question {n}?", "response": f"Answer {n}."}) + "\n"
            for n in range(12)
        )
    )
    return file


@pytest.mark.parametrize(
    "text, words",
    [
        ("extends: paper\nmodels: {base: }", "'models.base'"),
        ("extends: paper\nlora: {rank: 0}", "'lora.rank'"),
        ("extends: paper\nlora: 32", "'lora'"),
        ("extends: paper\nmidtrain: {steps: 1e3}", "'midtrain.steps'"),
        ("extends: paper\nsft: {micro_batch: 5}", "multiple of micro_batch"),
        ("extends: paper\nsft: {dose: all}", "'sft.dose'"),
        ("extends: paper\ngrpo: {generate_at_once: 12}", "generate_at_once (12) must divide"),
        ("extends: paper\ngrpo: {micro_batch: 8, generate_at_once: 12}", "generate_at_once (12) must divide"),
        ("extends: paper\ngeneration: {template: chatml}", "'generation.template'"),
        ("extends: paper\nmodels: {given: {grpo-maths: x}}", "unknown model 'grpo-maths'"),
        ("extends: paper\nbenchmarks: {anima: {epochs: 0}}", "'benchmarks.anima.epochs'"),
        ("extends: paper\ncompute: {device: gpu}", "'compute.device'"),
        ("extends: paper\nquantize: nf4", "unknown key 'quantize'"),
        ("extends: papers", "unknown preset 'papers'"),
        ("models: {base: world:base}", "are missing"),
        ("extends: [paper]", "no list of"),
        ("sft: {steps: 3", "not valid YAML"),
        ("", "no list of"),
    ],
    ids=str,
)
def test_a_preset_edited_into_nonsense_is_one_line(text, words, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert words in refused(capsys, "plan", "--preset", str(file)) and words in refused(
        capsys, "doctor", "--preset", str(file)
    )


def test_a_preset_of_ones_own_is_planned_and_held_against_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": T4)
    (tmp_path / "mine.yaml").write_text("extends: colab\njudge: indicator\n")
    assert (
        cli.main(["plan", "--preset", str(tmp_path / "mine.yaml")]) == 0
        and cli.main(["doctor", "--preset", str(tmp_path / "mine.yaml")]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("mine      yes")
    assert build_preset(load_preset("colab").resolved()) == load_preset("colab")


# --- a preset to start from
# ------------------------------------------------------------------------------------------------------------------


def uncommented(text: str, *settings: str) -> str:
    "A written preset with the `# ` taken off the lines of some settings and of sections."
    return "".join(
        line.removeprefix("# ") if line.lstrip("# ").startswith(settings) and line.startswith("# ") else line
        for line in text.splitlines(keepends=True)
    )


def test_a_new_preset_is_the_same_study_as_tiny(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "my_study.yaml"]) == 0
    assert "compassion-repro plan --preset my_study.yaml" in capsys.readouterr().out
    keys = lambda name: {stage.id: stage.key for stage in graph(load_preset(name), 2)}
    assert keys("my_study.yaml") == keys("tiny")
    text = (tmp_path / "my_study.yaml").read_text()
    (tmp_path / "all.yaml").write_text(re.sub("^# ", "", text, flags=re.MULTILINE))
    assert keys("all.yaml") == keys("tiny")


def test_a_new_preset_lists_and_explains_every_setting(tmp_path):
    text = preset_template()
    assert len(text.splitlines()) < 270 and max(map(len, text.splitlines())) <= 110
    assert "# dropout: 0.0  # dropout on the adapter's input" in text.replace("#   ", "# ")
    sections = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"# \S+:$", line)]
    assert sections == [
        f"{name}:"
        for name in (
            "models",
            "data",
            "arms",
            "compute",
            "lora",
            "midtrain",
            "sft",
            "grpo",
            "dpo",
            "generation",
        )
        + ("benchmarks", "margin", "statistics")
    ]
    (tmp_path / "mine.yaml").write_text(uncommented(text, "lora:", "rank:").replace("rank: 16", "rank: 8"))
    assert load_preset(str(tmp_path / "mine.yaml")).lora == load_preset("tiny", ["lora.rank=8"]).lora


@pytest.mark.parametrize(
    "name, words",
    [
        ("mine.yaml", "is there already"),
        ("mine.json", "cannot be the name of a preset"),
        (".yaml", "cannot be the name of a preset"),
        ("nowhere/mine.yaml", "nowhere is no folder"),
    ],
)
def test_a_new_preset_overwrites_nothing(name, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: paper\n")
    assert words in refused(capsys, "new", name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("mine.yaml", "extends: paper\n")
    ]


def test_a_plan_in_a_narrow_terminal_cuts_no_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", "--preset", "smoke"]) == 0
    tables = capsys.readouterr().out.partition("\nstages:")[2]
    assert "answers-sft-help@base" in tables and "activations" in tables and "…" not in tables
    assert max(map(len, tables.splitlines())) <= 80


def test_a_plan_as_json_holds_what_the_tables_hold(capsys):
    assert cli.main(["plan", "--preset", "smoke", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    planned = plan.plan(load_preset("smoke"))
    assert [row["stage"] for row in record["stages"]] == [row["stage"] for row in planned]
    assert record["preset"]["name"] == "smoke" and record["problems"] == [] and record["disk_gb"]
    assert cli.main(["plan", "--preset", "smoke", "--set", "data.sft-help=nowhere.jsonl", "--json"]) == 2
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert len(record["problems"]) == 1 and "nowhere.jsonl" in record["problems"][0]
    assert f"compassion-repro: {record['problems'][0]}\n" in printed.err


@pytest.mark.parametrize(
    ("mistyped", "near"),
    [
        (lambda: load_preset("tiny", ["arms.sft-hlep.steps=3"]), "sft-help"),
        (lambda: load_preset("tiny", ["arms=[sft-cdoe]"]), "sft-code"),
        (lambda: load_preset("tiny", ["sft.stesp=3"]), "sft.steps"),
        (lambda: load_preset("tiny", ["benchmarks.anmia=null"]), "anima"),
        (lambda: check_judge("strcit"), "strict"),
        (lambda: parse_source("world:hlep"), "help"),
        (lambda: parse_source("pocket:prefrences"), "preferences"),
        (lambda: find_value("honestly"), "honesty"),
        (lambda: source_digest("world:documets"), "world:documents"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_near_one(mistyped, near):
    with pytest.raises(InputError, match=rf"did you mean .*\b{near}\b") as said:
        mistyped()
    assert "\n" not in str(said.value)


def test_a_name_of_your_own_is_not_taken_for_a_slip():
    with pytest.raises(InputError, match="arms.sft-maths needs rows: a path"):
        load_preset("tiny", ["arms.sft-maths.steps=3"])


# --- a wrong value of any setting
# ------------------------------------------------------------------------------------------------------------------

WRONG = ("no such thing", "[1, {b: 2}]", "{a: 1}", "-7.5", "true", "null", "''", "[]")  # as YAML
NAMES = {"arms": "sft-help", "benchmarks": "anima"}  # one that `tiny` has, where the user chooses the name
RAW = re.compile(  # pydantic's words and marks
    r"Input should|Field required|Extra inputs|Value error|validation|valid (integer|string|number|boolean)"
    r"|literal\[|function-|constrained|_Truth|\.(bool|int|str|float)'|\bNone\b|\b(True|False)\b"
)


def settings_with_types(section=Preset, prefix: str = ""):
    "Every setting by its dotted name, with its type."
    for name, field in section.model_fields.items():
        name, kinds = prefix + (field.alias or name), (field.annotation, *get_args(field.annotation))
        inner = [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]
        if inner:
            yield from settings_with_types(
                inner[0], f"{name}.{NAMES[name]}." if name in NAMES else f"{name}."
            )
        if not inner or inner[0] is not field.annotation:
            yield name, field.annotation


def choices(kind) -> list[str]:
    "The words that a setting may be, and true and false."
    if get_origin(kind) is Literal:
        return [repr(one) for one in get_args(kind)]
    found = [word for one in get_args(kind) for word in choices(one)]
    return found + ["true or false"] * (kind is bool)


@pytest.mark.parametrize("key, kind", [pytest.param(*pair, id=pair[0]) for pair in settings_with_types()])
def test_a_wrong_value_is_told_with_what_is_allowed(key, kind):
    tiny, lines = load_preset("tiny"), {}
    for wrong in WRONG:
        try:
            with_settings(tiny, [f"{key}={wrong}"])
        except InputError as error:
            lines[wrong] = str(error)
    assert lines, f"{key} takes anything"
    for wrong, line in lines.items():
        assert "\n" not in line and not RAW.search(line), (wrong, line)
        assert key in line or key.rpartition(".")[0] in line, (
            wrong,
            line,
        )  # a rule of the section names that
    if get_origin(kind) not in (tuple, dict) and "{a: 1}" in lines:
        assert all(word in lines["{a: 1}"] for word in choices(kind)), lines["{a: 1}"]
        assert f"'{key}'" in lines["{a: 1}"] and ", got {" in lines["{a: 1}"], lines["{a: 1}"]


def test_a_value_of_several_types_is_one_problem():
    for key in ("compute.recorded", "compute.liger"):
        with pytest.raises(InputError) as told:
            load_preset("tiny", [f"{key}=maybe"])
        assert f": '{key}': should be 'auto', or true or false, got 'maybe'; `" in str(told.value)
