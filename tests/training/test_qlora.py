"""The four-bit path with the tiny model through the same lines as the 8 B run: load, mid-train, merge,
fine-tune, GRPO, merge, evaluate; and what is told where a machine or a model lacks what it needs.
"""

import importlib.util
import json
import shutil
import subprocess
import types

import pandas as pd
import pytest
import torch
from conftest import CRASH_SIZE, NEW_PYTHON, assert_one_line, settings
from safetensors import safe_open
from transformers import AutoTokenizer
from trl import GRPOTrainer

from compassion_repro import cli
from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.evaluation import generate
from compassion_repro.pipeline import run, stages
from compassion_repro.presets import load_preset
from compassion_repro.store import graph
from compassion_repro.store.folder import Study
from compassion_repro.study import Compute, Generation, Grpo, Lora, Training
from compassion_repro.training import (
    device,
    encoding,
    grpo,
    merging,
    model_files,
    models,
    supervised,
    templates,
)

BASE = world.assets() / "base"
FOUR_BIT = (
    "models.quantize=nf4",
    "arms=[grpo-code]",
    "grpo.steps=1",
    "grpo.held_out=4",
    "grpo.micro_batch=auto",
    "midtrain.micro_batch=auto",
    "compute.memory_gb=2",
    "generation.cut_off_alarm=0",
    "generation.templates=[raw]",
    "benchmarks.anima.size={en: 2, ms: 1}",
    "benchmarks.moru.size={en: 2, ms: 1}",
)
TRAINED = ("mid", "grpo-code")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    "A finished study whose weights were held in four bits while they were trained."
    out, said = tmp_path_factory.mktemp("quantised") / "study", []
    preset = load_preset("smoke", [*CRASH_SIZE, *FOUR_BIT])
    done = run.run(preset, out, say=said.append, unsafe=True, page=False)
    return types.SimpleNamespace(
        folder=out, said="\n".join(said), results={m["stage"]: m["result"] for m in done.manifests()}
    )


@pytest.mark.long
def test_bit_widths_dtypes_and_merging_stand_in_the_manifests(quantised):
    for stage in TRAINED:
        result = quantised.results[stage]
        held = result["held"]
        assert (held["bits"], held["quantised_layers"], held["quantisation"]) == (
            4,
            28,
            "nf4, double quantisation",
        ), stage
        # the CPU's
        assert (held["dtype"], held["compute_dtype"], held["trained_dtype"]) == (
            "float32",
            "float32",
            "float32",
        )
        assert (
            result["merge"]
            == merging.METHODS["own"]["nf4"]
            == "NF4 base dequantised, LoRA merged, saved in bfloat16, in a fresh process"
        )
        check = result["merge_check"]
        assert (
            check["rows"] > 0 and abs(check["merged_loss"] - check["live_loss"]) <= check["tolerance"] == 0.01
        )
        assert result["out_of_memory"] == 0 and result["micro_batch"] * result["accumulation"] in (16, 8)
    assert quantised.results["mid"]["loss_after"] < quantised.results["mid"]["loss_before"]


def test_what_is_evaluated_is_the_saved_bfloat16_model(quantised):
    for stage in TRAINED:
        place = quantised.folder / "seed-1" / stage
        with safe_open(place / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
        config = json.loads((place / "config.json").read_text())
        assert config["dtype"] == "bfloat16" and "quantization_config" not in config
        assert (place / "adapter" / "adapter_model.safetensors").exists()
        assert (
            models.load_model(place).generation_config.eos_token_id
            == templates.load_tokenizer(place).eos_token_id
        )
    scores = Study(quantised.folder).table("scores")
    assert set(scores.model) == {"base", *TRAINED} and scores.score.notna().any()
    text = "".join(
        p.read_text(encoding="utf-8")
        for p in [*quantised.folder.rglob("manifest.json"), *quantised.folder.rglob("adapter_config.json")]
    )
    assert str(quantised.folder) not in text and str(BASE) not in text


def test_answers_that_do_not_end_raise_an_alarm(quantised):
    assert "warning: " in quantised.said and "more than the 0% of generation.cut_off_alarm" in quantised.said
    assert (
        stages.cut_off_alarm(0.2, Generation()) == [] and len(stages.cut_off_alarm(0.21, Generation())) == 1
    )


def test_one_switch_asks_every_model_in_other_forms(quantised):
    study = Study(quantised.folder)
    answers, other = (
        study.table("answers"),
        pd.read_parquet(quantised.folder / "seed-1" / "answers-mid.raw" / "answers.parquet"),
    )
    # the claims rest on one form
    assert len(answers) == len(answers.drop_duplicates(["model", "benchmark", "question_id", "epoch"]))
    assert (
        answers.prompt.str.startswith("<|begin_of_text|>Question: ").all()
        and not other.prompt.str.contains("Question: ").any()
    )
    means = study.table("templates")
    assert {"plain", "raw"} <= set(means.columns) and set(means.model) == {"base", *TRAINED}
    assert quantised.said.count("asked in the forms plain, raw") == 3
    scores = study.table("scores")
    assert means.set_index(["benchmark", "model"]).plain["anima", "mid"] == pytest.approx(
        100
        * scores[
            (scores.benchmark == "anima") & (scores.model == "mid") & (scores.dimension == "overall")
        ].score.mean()
    )


def test_a_four_bit_study_carries_on_on_another_machine(quantised):
    other = ("compute.memory_gb=7", "compute.checkpointing=always")
    said = []
    preset = load_preset("smoke", [*CRASH_SIZE, *FOUR_BIT, *other])
    run.run(preset, quantised.folder, say=said.append, unsafe=True, page=False)
    assert any("done, 0 to run" in line for line in said), said
    assert Study(quantised.folder).preset.compute.memory_gb == 7
    plain = {s.id: s.key for s in graph.graph(load_preset("smoke", CRASH_SIZE))}
    four_bit = {
        s.id: s.key
        for s in graph.graph(
            load_preset("smoke", [*CRASH_SIZE, "models.quantize=nf4", "compute.compile=true"])
        )
    }
    assert plain["base"] == four_bit["base"] and plain["mid"] != four_bit["mid"]


def test_a_merge_that_is_not_the_trained_model_is_never_kept(monkeypatch, tmp_path):
    real = merging._merge_apart

    def forgetful(
        adapter, base, out, how, way
    ):  # the adapter is lost in every merge; the base alone is right
        if way == "unmerged":
            real(adapter, base, out, how, way)
        else:
            shutil.copytree(base, out, dirs_exist_ok=True)

    monkeypatch.setattr(merging, "_merge_apart", forgetful)
    preset = load_preset(
        "smoke",
        [*CRASH_SIZE, "models.quantize=nf4", "arms=[]", "midtrain.steps=6", "models.merge_tolerance=0.001"],
    )
    study = Study.create(tmp_path / "study", preset)
    todo = {stage.id: stage for stage in graph.graph(preset)}
    for name in ("base", "mid"):
        manifest = stages.run_stage(study, preset, todo[name], lambda line: None)
    place, check = study.folder / "seed-1" / "mid", manifest["result"]["merge_check"]
    assert check["way"] == "unmerged" and check["off"] <= 0.001 < min(
        check["tried"][way] for way in ("own", "rounded", "float32")
    )
    assert model_files.is_unmerged(place) and not (place / "config.json").exists()


def test_grpo_that_runs_out_of_memory_goes_on_with_half(monkeypatch, tmp_path):
    real, seen, lines = GRPOTrainer.training_step, [], []

    def runs_out(trainer, *args, **kwargs):
        seen.append(
            (
                trainer.args.per_device_train_batch_size,
                trainer.args.gradient_accumulation_steps,
                trainer.args.generation_batch_size,
            )
        )
        if trainer.args.per_device_train_batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", runs_out)
    rows = [{"messages": row["messages"]} for row in world.corpus("help", 12, seed=1)]

    def length(prompts, completions, **columns):
        return [float(len(c[0]["content"])) for c in completions]

    small = Grpo(steps=1, samples=2, group=4, prompts_per_step=2, micro_batch=8, max_new_tokens=12)
    run = device.TrainRun(1, Lora(rank=4), lines.append)
    done = grpo.grpo(BASE, rows[:8], rows[8:], tmp_path / "arm", small, length, run)
    assert seen[0] == (8, 1, 8) and set(seen[1:]) == {(4, 2, 4)}
    assert (done["out_of_memory"], done["micro_batch"], done["accumulation"], done["steps"]) == (1, 4, 2, 1)
    assert any(
        "out of memory; starting again with micro-batch 4 and accumulation 2" in line for line in lines
    )


@pytest.mark.parametrize("template", ["plain", "raw", "user", "own"])
def test_training_grpo_and_evaluation_see_the_same_bytes(template, tmp_path):
    own = AutoTokenizer.from_pretrained(BASE)
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if"
        " add_generation_prompt %}[assistant] {% endif %}"
    )
    shutil.copytree(BASE, tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    question = {"role": "user", "content": "How do I mend a chair — “quickly”?"}
    tokenizer = templates.load_tokenizer(tmp_path / "model", template)
    asked = dict(
        benchmark="anima", language="en", item_id="1", question_id="1", question=question["content"], epochs=1
    )
    answers = generate.generate_answers(
        tmp_path / "model",
        "base",
        [asked],
        1,
        Generation(template=template, max_new_tokens=2, batch_size=1),
        report=lambda line: None,
    )
    prompt = encoding.encode_prompt([question], tokenizer)
    assert answers.prompt[0] == tokenizer.decode(prompt)
    row = encoding.encode_row(
        {"messages": [question, {"role": "assistant", "content": "Glue it."}]}, tokenizer
    )
    if template in ("plain", "own"):
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][: len(prompt)] == [
            encoding.IGNORE
        ] * len(prompt)
    assert row["labels"][-1] == tokenizer.eos_token_id

    def reward(prompts, completions, **columns):
        return [0.0] * len(prompts)

    trainer = grpo.make_trainer(
        tmp_path / "model",
        [{"messages": [question]}],
        Grpo(steps=1, group=2, prompts_per_step=1, micro_batch=2, max_new_tokens=2),
        reward,
        tmp_path / "out",
        device.TrainRun(1, template=template),
    )
    given = trainer._tokenize_prompts([[question]])
    assert (given[0] if isinstance(given, tuple) else given)[0] == prompt


@pytest.mark.parametrize(
    "words, said",
    [
        (["models.quantize=int3"], "nf4"),
        (["compute.device=cuda"], "this machine has none"),
        (["models.dtype=float16"], "needs a GPU"),
        (["compute.optimizer=paged_adamw_8bit"], "needs a GPU"),
        (["compute.liger=true"], "liger_kernel"),
        (["sft.micro_batch=some"], "or auto"),
        (["generation.template=own"], "no chat template of its own"),
        (["compute.checkpointing=yes"], "checkpointing"),
    ],
)
def test_what_the_machine_or_the_model_lacks_is_told_in_one_line(words, said, capsys, tmp_path):
    if torch.cuda.is_available() and said in ("this machine has none", "needs a GPU"):
        pytest.skip("this machine has a GPU")
    if said == "liger_kernel" and importlib.util.find_spec(said):
        pytest.skip("liger_kernel is installed")
    base = shutil.copytree(BASE, tmp_path / "model")
    file = base / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"})
    )
    (base / "chat_template.jinja").unlink(missing_ok=True)
    status = cli.main(
        [
            "run",
            "--preset",
            "smoke",
            "--out",
            str(tmp_path / "study"),
            *settings(f"models.base={base}", *words),
        ]
    )
    assert_one_line(types.SimpleNamespace(returncode=status, stderr=capsys.readouterr().err), said)
    assert not list((tmp_path / "study").glob("seed-1/mid"))


def test_a_model_of_another_architecture_and_a_tokenizer_without_an_end(capsys, tmp_path):
    def refused(base):
        status = cli.main(
            [
                "run",
                "--preset",
                "smoke",
                "--out",
                str(tmp_path / f"study-{base.name}"),
                *settings(f"models.base={base}"),
            ]
        )
        line = capsys.readouterr().err
        assert_one_line(types.SimpleNamespace(returncode=status, stderr=line))
        return line

    other, endless = (shutil.copytree(BASE, tmp_path / name) for name in ("other", "endless"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
    )
    assert "which is no causal language model" in refused(other)
    settings_file = endless / "tokenizer_config.json"
    settings_file.write_text(
        json.dumps({k: v for k, v in json.loads(settings_file.read_text()).items() if k != "eos_token"})
    )
    assert "has no end token" in refused(endless)


FOUR_BITS = device.TrainSetup("cpu", torch.float32, "nf4")


def test_the_fresh_process_tells_its_fault_in_one_line(tmp_path):
    with pytest.raises(InputError, match="^merging failed: .* is not a model folder: it has no config.json$"):
        merging._merge_apart(tmp_path, tmp_path, tmp_path / "out", FOUR_BITS)


def test_a_new_python_merges_to_the_bytes_of_a_fork(quantised, monkeypatch, tmp_path):
    "The tests' merges are forks of one process (`forks.py`); users' are new processes."
    monkeypatch.setattr(subprocess, "run", NEW_PYTHON)
    mid = quantised.folder / "seed-1" / "mid"
    merging._merge_apart(mid / "adapter", BASE, tmp_path, FOUR_BITS)
    assert (tmp_path / "model.safetensors").read_bytes() == (mid / "model.safetensors").read_bytes()


def test_packed_rows_reach_the_varlen_kernel_through_the_trainer(monkeypatch):
    """The kernel needs a GPU; a slow loop in its place shows that the trainer hands over where rows begin and
    end, with checkpointing too, and that the losses are those of the masked attention.
    """
    calls = []

    def slow_rows(query, key, value, borders, *args, scale=None, window_size=None, enable_gqa=False):
        calls.append(len(borders) - 1)

        def one(a, b):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in (query, key, value)), is_causal=True, scale=scale
            ).transpose(0, 1)

        return torch.cat([one(a, b) for a, b in zip(borders.tolist(), borders.tolist()[1:])])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_rows)
    rows, small, tokenizer = (
        world.corpus("documents", 30, seed=1),
        Training(steps=2, batch_size=4, micro_batch=2, length=256, learning_rate=1e-3),
        templates.load_tokenizer(BASE),
    )
    losses = {}
    for attention, again in (("sdpa", False), ("varlen", False), ("varlen", True)):
        how = device.TrainSetup(compute=Compute(attention=attention))
        _, done = supervised.train(
            device.load_held(BASE, how),
            tokenizer,
            rows,
            small,
            2,
            device.TrainRun(1, Lora(rank=4), lambda line: None, "mid", setup=how),
            again,
        )
        losses[attention, again] = [entry["loss"] for entry in done["log"]]
    assert calls and max(calls) > 2
    for key in losses:
        assert losses[key] == pytest.approx(losses["sdpa", False], abs=1e-4)
