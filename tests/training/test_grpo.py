"""GRPO from folder to folder: killed and carried on, with every kind of reward, and what it leaves behind."""

import os
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import FORKS, wait_for
from transformers import MistralConfig, MistralForCausalLM

from compassion_repro import study
from compassion_repro.core.errors import InputError
from compassion_repro.data import rows as data
from compassion_repro.data import world
from compassion_repro.study import Lora
from compassion_repro.training import encoding, grpo, held_out, models, static_decoding, templates
from compassion_repro.training.device import TrainRun, TrainSetup
from compassion_repro.training.recording import Unrecorded
from compassion_repro.training.rewards import answer_text

BASE, LORA = world.assets() / "base", Lora(rank=4, alpha=8)
SMALL = dict(
    steps=3,
    learning_rate=2e-3,
    group=4,
    prompts_per_step=2,
    micro_batch=4,
    max_new_tokens=20,
    held_out=4,
    samples=2,
)
ROWS, HELD_OUT = world.corpus("code", 12), world.corpus("code", 4, held_out=True)


def short_words(prompts, completions, **columns):
    "Pays for short words: something a tiny model can do in a moment."
    return [-sum(map(len, (words := answer_text(c).split()))) / max(len(words), 1) for c in completions]


def run(out, reward=short_words, rows=ROWS, lora=LORA, checkpoints=None, **changes):
    quiet = TrainRun(1, lora, lambda line: None, checkpoints=checkpoints)
    return grpo.grpo(BASE, rows, HELD_OUT, out, study.Grpo(**(SMALL | changes)), reward, quiet)


def weights(folder):
    return models.load_model(folder).state_dict()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_time(log):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A folder and what was told of it: three steps that nothing cut off."
    folder = tmp_path_factory.mktemp("whole") / "arm"
    return folder, run(folder)


def test_what_is_left_behind_is_a_plain_model_whose_answers_end(whole):
    folder, done = whole
    assert not list(folder.glob("adapter*")) and (folder / "completions.parquet").exists()
    model, tokenizer = models.load_model(folder), templates.load_tokenizer(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert not equal(weights(BASE), weights(folder))
    assert len(done["log"]) == 3 and done["completions"] == 24 and done["settings"]["beta"] == 0.04


SCRIPT = """
import os, sys, time
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)  # a fork's Python is running already
from test_grpo import run, short_words
def slow(prompts, completions, **columns):
    time.sleep(1)
    return short_words(prompts, completions)
slow.__name__ = "short_words"
run(sys.argv[1], slow, checkpoints=sys.argv[2], save_every=1)
"""


def test_killed_without_warning_it_carries_on_and_ends_the_same(whole, tmp_path):
    "The same as without a kill and without checkpoints, and so the same as when it is run again."
    checkpoints = tmp_path / "checkpoints"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = FORKS.start(SCRIPT, [str(tmp_path / "arm"), str(checkpoints)], environment=environment)
    wait_for((checkpoints / "checkpoint-2").exists, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    told = []
    done = grpo.grpo(
        BASE,
        ROWS,
        HELD_OUT,
        tmp_path / "arm",
        study.Grpo(**(SMALL | dict(save_every=1))),
        short_words,
        TrainRun(1, LORA, told.append, checkpoints=checkpoints),
    )
    assert any("carrying on from step" in line for line in told)
    folder, record = whole
    assert without_time(done["log"]) == without_time(record["log"])
    assert equal(weights(tmp_path / "arm"), weights(folder))
    assert pd.read_parquet(tmp_path / "arm" / "completions.parquet").equals(
        pd.read_parquet(folder / "completions.parquet")
    )
    assert [place.name for place in checkpoints.glob("checkpoint-*")] == ["checkpoint-3"]


def test_killed_after_its_last_step_it_trains_no_further(whole, tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) == 5:
            raise KeyboardInterrupt  # measured before, three steps, and now after
        return short_words(prompts, completions)

    reward.__name__ = "short_words"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "arm", reward, checkpoints=tmp_path / "checkpoints")
    done, (folder, record) = run(tmp_path / "arm", reward, checkpoints=tmp_path / "checkpoints"), whole
    assert len(calls) == 6  # neither a step nor the measurement before training was made again
    assert without_time(done["log"]) == without_time(record["log"])
    assert equal(weights(tmp_path / "arm"), weights(folder))
    assert pd.read_parquet(tmp_path / "arm" / "held_out.parquet").equals(
        pd.read_parquet(folder / "held_out.parquet")
    )


def test_checkpoints_of_other_settings_are_not_taken_up(tmp_path):
    def break_at_the_end(prompts, completions, **columns):
        if columns["trainer_state"] and columns["trainer_state"].global_step == 2:
            raise KeyboardInterrupt
        return short_words(prompts, completions)

    def reward(prompts, completions, trainer_state=None, **columns):
        return break_at_the_end(prompts, completions, trainer_state=trainer_state)

    reward.__name__ = "short_words"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "arm", reward, checkpoints=tmp_path / "checkpoints", save_every=1)
    told = []
    settings = study.Grpo(**(SMALL | dict(save_every=1, beta=0.5)))
    again = TrainRun(1, LORA, told.append, checkpoints=tmp_path / "checkpoints")
    grpo.grpo(BASE, ROWS, HELD_OUT, tmp_path / "arm", settings, short_words, again)
    assert not any("carrying on" in line for line in told)


def test_training_every_weight_keeps_a_copy_of_the_start_as_reference(tmp_path):
    done = run(tmp_path / "arm", lora=None, steps=2, learning_rate=1e-4)
    assert done["log"][0]["kl"] == pytest.approx(0, abs=1e-6) and done["log"][1]["kl"] > 1e-5
    assert done["merge"] == "every weight trained" and done["reference"] == "a copy of the start"


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_cache_of_fixed_size_samples_like_generate(tmp_path, lora):
    done = run(tmp_path / "arm", lora=lora, engine="static", steps=1)
    assert done["engine"] == "static" and not equal(weights(BASE), weights(tmp_path / "arm"))
    sampled = pd.read_parquet(tmp_path / "arm" / "completions.parquet")
    assert len(sampled) == 8 and sampled.completion.str.len().gt(0).all() and sampled.completion.nunique() > 4


def test_a_policy_with_a_window_samples_by_generate(tmp_path):
    said = []
    window = MistralConfig(
        vocab_size=4000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    MistralForCausalLM(window).save_pretrained(tmp_path / "start")
    templates.load_tokenizer(BASE).save_pretrained(tmp_path / "start")
    told = TrainRun(1, LORA, said.append)
    training = study.Grpo(**(SMALL | {"engine": "static", "steps": 1}))
    done = grpo.grpo(tmp_path / "start", ROWS, HELD_OUT, tmp_path / "arm", training, short_words, told)
    assert (done["engine"], done["engine_reason"]) == ("transformers", static_decoding.NOT_SEEN)
    assert any("plain generate decodes" in str(line) for line in said)


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_policy_whose_steps_cannot_be_recorded_samples_by_generate(tmp_path, out_of_memory):
    said = []

    def refuse(step, device):
        step()
        raise Unrecorded("no room for it", out_of_memory)

    training = study.Grpo(**(SMALL | {"engine": "static", "steps": 2}))
    with mock.patch.object(static_decoding, "record", refuse):
        told = TrainRun(1, LORA, said.append)
        done = grpo.grpo(BASE, ROWS, HELD_OUT, tmp_path / "arm", training, short_words, told)
    assert done["engine"] == "transformers" and "no room for it" in done["engine_reason"]
    assert done["out_of_memory"] == 0 and sum("plain generate decodes" in str(line) for line in said) == 1
    assert not equal(weights(BASE), weights(tmp_path / "arm"))


def test_weights_spread_over_processes_are_sampled_by_generate():
    said, trainer = [], SimpleNamespace(model=SimpleNamespace(generate=None))
    spread = TrainSetup(compute=study.Compute(sharding="fsdp", processes=2))
    with mock.patch.object(grpo, "fits", return_value=True):
        grpo._sample_statically(trainer, TrainRun(1, None, said.append, setup=spread))
        assert trainer.model.generate is None and "compute.sharding" in str(said)
        told = grpo._engine(trainer, study.Grpo(engine="static"))
        assert told["engine"] == "transformers" and "compute.sharding" in told["engine_reason"]
        grpo._sample_statically(trainer, TrainRun(1, None, said.append, setup=TrainSetup()))
    assert trainer.model.generate and len(said) == 1


def test_the_settings_of_trl_have_no_reference(tmp_path):
    done = run(tmp_path / "arm", settings="trl", steps=2)
    assert [record["kl"] for record in done["log"]] == [None, None] and done["settings"]["loss"] == "dapo"


def test_no_steps_leave_the_start_untouched(tmp_path):
    done = run(tmp_path / "arm", steps=0)
    assert equal(weights(BASE), weights(tmp_path / "arm")) and (
        done["gain"],
        done["trained"],
        done["log"],
    ) == (0, False, [])


def test_a_reward_that_never_varies_trains_nothing_and_is_reported(tmp_path):
    done = run(tmp_path / "arm", lambda prompts, completions, **columns: [1.0] * len(prompts))
    assert not done["trained"] and any("no variance" in line for line in done["warnings"])
    assert {record["zero_variance"] for record in done["log"]} == {1.0}


def test_answers_that_never_end_are_warned_of(tmp_path):
    assert any("token limit" in line for line in run(tmp_path / "arm", max_new_tokens=2, steps=2)["warnings"])


def test_a_reward_may_abstain_now_and_then(tmp_path):
    done = run(
        tmp_path / "arm",
        lambda prompts, completions, **columns: [None, *short_words(prompts, completions)[1:]],
        steps=2,
    )
    assert [record["abstained"] for record in done["log"]] == [1 / 8, 1 / 8]
    with pytest.raises(InputError, match="cannot judge a single answer"):
        run(tmp_path / "none", lambda prompts, completions, **columns: [None] * len(prompts))


def test_the_reward_sees_the_columns_of_its_row(tmp_path):
    seen = []

    def reward(prompts, completions, tests=None, reference=None, **columns):
        seen.extend(zip((prompt[-1]["content"] for prompt in prompts), tests, reference))
        return [0.0] * len(prompts)

    run(tmp_path / "arm", reward, steps=1)
    known = {
        (row["messages"][0]["content"], row["tests"], row["messages"][1]["content"])
        for row in ROWS + HELD_OUT
    }
    assert seen and set(seen) <= known


def test_rows_without_answers_and_with_turns_before_them(tmp_path):
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Define add."},
    ]
    rows = [{"messages": turns}, {"messages": turns[:1]}, *data.load("world:help", "prompts", limit=4).rows]
    tokenizer = templates.load_tokenizer(BASE)
    kept = grpo.prompt_rows(rows, tokenizer, 200)
    assert [row["messages"] for row in kept] == [row["messages"] for row in rows] and kept[0][
        "reference"
    ] is None
    rendered = tokenizer.apply_chat_template(
        [row["messages"] for row in kept],
        chat_template=templates.CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert rendered == [encoding.encode_prompt(row["messages"], tokenizer) for row in kept]
    assert run(tmp_path / "arm", rows=rows, steps=1)["rows"] == 6


def test_long_prompts_are_left_out_and_too_few_are_refused(tmp_path):
    long = {"messages": [{"role": "user", "content": "add " * 500}]}
    assert run(tmp_path / "arm", rows=[*ROWS[:4], long], steps=1, max_prompt_tokens=100)["rows"] == 4
    with pytest.raises(InputError, match="none of the 1 prompts"):
        run(tmp_path / "arm", rows=[long], max_prompt_tokens=100)
    with pytest.raises(InputError, match="fewer than one step"):
        run(tmp_path / "arm", rows=ROWS[:1])


def test_the_sampling_of_held_out_answers_leaves_the_chance_alone():
    model, tokenizer = models.load_model(BASE), templates.load_tokenizer(BASE)
    rows, settings = grpo.prompt_rows(HELD_OUT, tokenizer, 200), study.Grpo(**SMALL)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = held_out.sample_answers(model, tokenizer, rows, settings, 1)
    assert torch.equal(torch.rand(3), expected)
    assert (
        first
        == held_out.sample_answers(model, tokenizer, rows, settings, 1)
        != held_out.sample_answers(model, tokenizer, rows, settings, 2)
    )


def test_replayed_documents_are_learned_next_to_the_reward(whole, tmp_path):
    documents = data.load("world:documents", "text", limit=2, seed=1).rows
    replay = TrainRun(1, LORA, lambda line: None, replay=0.8, replayed=documents)
    done = grpo.grpo(BASE, ROWS, HELD_OUT, tmp_path / "arm", study.Grpo(**SMALL), short_words, replay)
    tokenizer = templates.load_tokenizer(BASE)
    start, plain, replayed = (
        models.row_losses(models.load_model(place), tokenizer, documents).mean()
        for place in (BASE, whole[0], tmp_path / "arm")
    )
    assert replayed < min(start, plain) - 0.01 and done["accumulation"] == 2
