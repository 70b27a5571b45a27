"""What only a GPU can show: recorded steps train as the plain ones, and decode as the plain ones."""

from functools import partial

import pytest
import torch
from fastcore.test import test_close as close
from peft import get_peft_model
from transformers import GenerationConfig

from compassion_repro.bench.model import random_model
from compassion_repro.data import world
from compassion_repro.evaluation import generate
from compassion_repro.study import Compute, Generation, Grpo, Lora, Models, Training
from compassion_repro.training import supervised
from compassion_repro.training.adapters import lora_config
from compassion_repro.training.device import TrainRun, load_held, train_setup
from compassion_repro.training.encoding import encode_prompt
from compassion_repro.training.grpo import make_trainer, prompt_rows
from compassion_repro.training.models import load_model
from compassion_repro.training.recorded_steps import Recorded
from compassion_repro.training.recording import Unrecorded, record
from compassion_repro.training.static_decoding import Batch, sample
from compassion_repro.training.templates import load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
SHAPE = dict(vocab_size=2400, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A model of random weights in 16 bits."
    return random_model(tmp_path_factory.mktemp("start"), SHAPE, "cuda")


def trained(start, recorded, micro_batch=4, lora=Lora(rank=8), steps=12):
    "The log of a short training, whether its steps were replayed, and the weights."
    setup = train_setup(Models(base=str(start)), Compute(recorded=recorded))
    training = Training(length=256, batch_size=4, micro_batch=micro_batch, learning_rate=1e-3, steps=steps)
    rows = world.corpus("documents", 60, seed=1)
    model, tokenizer = load_held(start, setup), load_tokenizer(start)
    run = TrainRun(1, lora, lambda line: None, setup=setup)
    model, done = supervised.train(model, tokenizer, rows, training, steps, run)
    return done, model


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_recorded_steps_have_the_losses_of_plain_ones(start, micro_batch):
    plain, _ = trained(start, False, micro_batch)
    ours, _ = trained(start, True, micro_batch)
    assert ours["recorded"] and "recorded" not in plain
    close([step["loss"] for step in ours["log"]], [step["loss"] for step in plain["log"]], eps=1e-3)
    assert [step["tokens"] for step in ours["log"]] == [step["tokens"] for step in plain["log"]]
    assert ours["log"][-1]["loss"] < ours["log"][0]["loss"] - 0.5  # it learned


def test_recorded_steps_train_whole_weights_too(start):
    plain, _ = trained(start, False, lora=None, steps=6)
    ours, _ = trained(start, True, lora=None, steps=6)
    assert ours["recorded"]
    close([step["loss"] for step in ours["log"]], [step["loss"] for step in plain["log"]], eps=5e-3)


def test_a_recorded_training_is_the_same_twice(start):
    one, other = (trained(start, True)[1].state_dict() for _ in range(2))
    apart = max((one[name].float() - other[name].float()).abs().max().item() for name in one)
    assert apart < 1e-3, apart


def on_gpu(folder):
    "The embedded base in float32, without TF32, and its tokenizer."
    torch.set_float32_matmul_precision("highest")
    return load_model(folder, "cuda", dtype=torch.float32), load_tokenizer(folder)


def test_recorded_decoding_gives_the_answers_of_plain_generate():
    network, tokenizer = on_gpu(world.assets() / "base")
    texts = [f"How do I clean the {'very ' * i}old lamp?" for i in range(9)]
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    uniforms = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)).cuda()
    generation, found = Generation(max_new_tokens=40, temperature=0.8, top_p=0.95), []
    settings = generate._settings(network, tokenizer, max_new_tokens=40)
    for numbers in (None, uniforms):
        made = partial(generate._processors, generation, uniforms)
        found.append(generate._answer_batch(network, prompts, settings, made, numbers))
    equal = sum(plain == static for plain, static in zip(*found))
    assert equal >= 8, (equal, found)  # where two tokens are as good as equal, one answer may differ


def test_a_policy_samples_the_tokens_of_plain_generate():
    network, tokenizer = on_gpu(world.assets() / "base")
    policy = get_peft_model(network, lora_config(Lora(rank=8)))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    ids = torch.randint(4, 300, (8, 12)).cuda()
    greedy = dict(max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    settings = GenerationConfig(**greedy, eos_token_id=[tokenizer.eos_token_id], temperature=1e-5)
    ours = sample(policy.get_base_model(), ids, torch.ones_like(ids), settings)
    plain = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    equal = (ours[:, : plain.shape[1]] == plain).all(1).sum()
    assert equal >= 7, (ours, plain)


@pytest.mark.parametrize("engine", ["transformers", "static"])
def test_a_policy_learns_from_its_samples(engine, tmp_path):
    base = world.assets() / "base"
    setup, tokenizer = train_setup(Models(base=str(base))), load_tokenizer(base)
    batch = dict(group=8, prompts_per_step=8, micro_batch=64, max_prompt_tokens=96, max_new_tokens=24)
    training = Grpo(settings="trl", steps=20, learning_rate=1e-3, engine=engine, **batch)
    prompts = prompt_rows(world.corpus("help", 180), tokenizer, training.max_prompt_tokens)

    def varied(completion_ids, **columns):
        "A reward that can be learnt: the share of even tokens."
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    run = TrainRun(0, Lora(rank=16, alpha=32), lambda line: None, setup=setup)
    trainer = make_trainer(base, prompts, training, varied, tmp_path, run)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.03, rewards


def asks_the_processor(work):
    "The same work, which no graph can record."

    def asking(self, *how):
        work(self, *how)
        float(torch.ones(1, device="cuda").sum())

    return asking


def recorded_afterwards() -> float:
    "What a new recording computes after one that failed: draws, and memory of its own."
    place = torch.zeros(4, device="cuda")
    again = record(lambda: place.add_(torch.rand(4, device="cuda")), place.device)
    again()
    return place.sum().item()


def test_steps_that_cannot_be_recorded_run_one_by_one(start, monkeypatch):
    plain, _ = trained(start, False, 2)
    monkeypatch.setattr(Recorded, "_pass", asks_the_processor(Recorded._pass))
    ours, _ = trained(start, True, 2)
    assert "recorded" not in ours
    close([step["loss"] for step in ours["log"]], [step["loss"] for step in plain["log"]], eps=1e-3)
    assert 0 < recorded_afterwards() < 8


def test_answers_that_cannot_be_recorded_are_those_of_plain_generate(monkeypatch):
    opened, said, found = on_gpu(world.assets() / "base"), [], []
    asked = {"benchmark": "gpu", "language": "en", "epochs": 1, "question": "How do I clean the old lamp?"}
    questions = [asked | {"item_id": str(n), "question_id": str(n)} for n in range(6)]
    monkeypatch.setattr(Batch, "advance", asks_the_processor(Batch.advance))
    for engine in ("transformers", "static"):
        generation = Generation(max_new_tokens=24, batch_size=2, engine=engine)
        found.append(generate.generate_answers(opened, "base", questions, 0, generation, report=said.append))
    assert found[0].text.tolist() == found[1].text.tolist()
    assert found[1].attrs["engine"] == "transformers" and "captur" in found[1].attrs["engine_reason"]
    assert sum("plain generate decodes" in str(line) for line in said) == 1
    assert 0 < recorded_afterwards() < 8


def test_a_policy_that_cannot_be_recorded_samples_by_plain_generate(monkeypatch, tmp_path):
    monkeypatch.setattr(Batch, "advance", asks_the_processor(Batch.advance))
    test_a_policy_learns_from_its_samples("static", tmp_path)


def test_too_little_memory_for_a_recording_is_told_apart():
    place = torch.zeros(1, device="cuda")
    before, ran = torch.cuda.memory_allocated(), []

    def growing():
        "Needs little when it runs first, and more than there is when it is recorded."
        ran.append(1)
        place.add_(torch.ones(2**40 if len(ran) == 2 else 1, device="cuda")[0])

    with pytest.raises(Unrecorded) as refused:
        record(growing, place.device)
    assert refused.value.out_of_memory
    assert 0 < recorded_afterwards() < 8
    assert torch.cuda.memory_allocated() - before < 2**20
