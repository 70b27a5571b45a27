"""Real cases: models, tokenizers and adapters that others made, one line a case."""

import json
import shutil
from functools import partial

import bitsandbytes as bnb
import peft
import pytest
import torch
from cases import Case, problem, table
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from compassion_repro.data import world
from compassion_repro.evaluation.generate import open_model
from compassion_repro.pipeline.model_answers import weights_identity
from compassion_repro.pipeline.preflight_models import look_at_model
from compassion_repro.study import Models
from compassion_repro.training import adapters, device, encoding, grpo, model_checks, models, templates

BASE = world.assets() / "base"


def copied(folder, **config):
    "The embedded base with other settings."
    place = folder / "model"
    shutil.copytree(BASE, place)
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | config))
    return place


def altered(folder, change):
    "The embedded base with other weights."
    place = copied(folder)
    weights = load_file(place / "model.safetensors")
    save_file(change(weights), place / "model.safetensors", {"format": "pt"})
    return place


def opened(place):
    network, tokenizer = open_model(place, "cpu")
    return f"{network.num_parameters()} parameters, padding {templates.padding_note(tokenizer)}"


def seen_before(place):
    "What a study says before its first stage."
    return look_at_model(str(place), "plain", True).name


def spoiled(weights):
    first = next(iter(weights))
    return weights | {first: weights[first].clone().fill_(float("nan"))}


def sharded(folder):
    "Two shards, an infinite number in one, and a file of NaN that the index does not name."
    place = copied(folder)
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    weights["model.norm.weight"][3] = -float("inf")
    halves = {
        "model-00001-of-00002.safetensors": half(weights),
        "model-00002-of-00002.safetensors": {k: v for k, v in weights.items() if k not in half(weights)},
    }
    for name, part in halves.items():
        save_file(part, place / name, {"format": "pt"})
    save_file({"other": torch.full((2,), float("nan"))}, place / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": {key: name for name, part in halves.items() for key in part}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return seen_before(place)


def remote(folder):
    place = copied(
        folder,
        model_type="mymodel",
        architectures=["MyForCausalLM"],
        auto_map={"AutoConfig": "configuration_my.MyConfig"},
    )
    (place / "configuration_my.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
    )
    try:
        return opened(place)
    finally:
        assert not (folder / "ran").exists()


def remote_tokenizer(folder):
    place = copied(folder)
    file = place / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            settings
            | {
                "tokenizer_class": "MyTokenizer",
                "auto_map": {"AutoTokenizer": ["my.MyTokenizer", None]},
            }
        )
    )
    (place / "my.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    seen = opened(place)
    assert not (folder / "ran").exists()
    return seen


def dequantised(folder, eight=False):
    """Whether a bitsandbytes model is opened and saved as plain weights, the ones that bitsandbytes itself
    gives.
    """
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if eight
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    packed = AutoModelForCausalLM.from_pretrained(
        BASE, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    packed.save_pretrained(folder / "packed")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "packed")
    network, tokenizer = open_model(folder / "packed", "cpu")
    again = models.load_model(models.save_model(network, tokenizer, folder / "plain"), "cpu")
    assert not hasattr(again.config, "quantization_config")
    found = again.state_dict()
    if eight:
        wanted, bound = models.load_model(BASE, "cpu").state_dict(), 0.05
    else:
        linear = {
            name: part.weight for name, part in packed.named_modules() if isinstance(part, bnb.nn.Linear4bit)
        }
        wanted = {
            f"{name}.weight": bnb.functional.dequantize_4bit(w.data, w.quant_state)
            for name, w in linear.items()
        }
        bound = 1e-6
    return f"{max((found[key] - value).norm() / value.norm() for key, value in wanted.items()) < bound}"


def adapter(folder, config=None, base=str(BASE), change=lambda weights: weights, **settings):
    "A small LoRA adapter of the embedded base, with what is wrong with it."
    torch.manual_seed(0)
    config = config or LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    model = get_peft_model(models.load_model(BASE, "cpu"), config)
    model.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    return folder / "adapter"


def with_setting(place, **settings):
    "The same adapter with more settings."
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return place


def renamed(weights, old, new):
    return {key.replace(old, new): value for key, value in weights.items()}


def half(weights):
    return {key: value for i, (key, value) in enumerate(weights.items()) if i % 2}


def merged(folder, **settings):
    "Whether the merged model answers as the live one."
    place = adapter(folder, **settings)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        live = adapters.attach(models.load_model(BASE, "cpu"), place)(ids).logits
        assert (live - models.load_model(BASE, "cpu")(ids).logits).abs().max() > 1e-3
        return f"{(open_model(place, 'cpu')[0](ids).logits - live).abs().max() < 1e-2}"


def as_trained(folder, kind="Lora", **settings):
    """Whether an adapter of a kind passes before stage 1 and opens as the model that was trained, saved and
    opened again too.
    """
    torch.manual_seed(0)
    if "num_virtual_tokens" not in settings:
        settings = {"target_modules": ["q_proj", "down_proj"]} | settings
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(models.load_model(BASE, "cpu"), config).eval()
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
        live = None if config.is_prompt_learning else model(ids).logits
    model.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(BASE)}))
    torch.manual_seed(1)
    adapters.check_adapter(folder / "adapter", "ADAPTER", BASE)
    network, tokenizer = open_model(folder / "adapter", "cpu")
    saved = models.load_model(models.save_model(network, tokenizer, folder / "plain"), "cpu")
    with torch.no_grad():
        moved = (live - models.load_model(BASE, "cpu")(ids).logits).abs().max()
        off = max((other(ids).logits - live).abs().max() for other in (network, saved))
    return f"{bool(off < 1e-3 * moved)}"


def with_more_tokens(folder, kind="llama", tokens=3, **settings):
    """Whether an adapter that was trained with an enlarged embedding passes before stage 1 and opens as it was
    trained.
    """
    torch.manual_seed(0)
    tokenizer, sizes = AutoTokenizer.from_pretrained(BASE), {"hidden_size": 32, "num_hidden_layers": 1}
    shape = {"vocab_size": len(tokenizer), "num_attention_heads": 2, "intermediate_size": 64} | sizes
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    network = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    network.resize_token_embeddings(len(tokenizer) + tokens)
    model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    ids = torch.tensor([[5, 6, 7, len(tokenizer) + tokens - 1]])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
        live = model(ids).logits
    model.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": str(folder / "base")}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    tokenizer.add_tokens([f"more {n}" for n in range(3)])
    tokenizer.save_pretrained(folder / "adapter")
    adapters.check_adapter(folder / "adapter", "ADAPTER", folder / "base")
    with torch.no_grad():
        return f"{bool((open_model(folder / 'adapter', 'cpu')[0](ids).logits - live).abs().max() < 1e-4)}"


def given(folder, base):
    place = adapter(folder, base=base)
    return adapters.given_base(Models(base="world:base", given={"mid": str(place)}), "mid", place)


def trained_again(folder):
    "Whether an evaluation sees that the local base of an adapter was trained again."
    base = copied(folder)
    place = adapter(folder, base=str(base))
    before = weights_identity(str(place))
    save_file(
        {key: value * 1.1 for key, value in load_file(base / "model.safetensors").items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    return before != weights_identity(str(place))


def tokenizer(folder, pad=None, add=(), **special):
    "A tokenizer with these special tokens, beside the embedded model."
    place = copied(folder)
    own = json.loads((place / "tokenizer.json").read_text())
    own["added_tokens"] = [token for token in own["added_tokens"] if token["content"] != templates.PAD]
    (place / "tokenizer.json").write_text(json.dumps(own).replace(templates.PAD, "Zz spare"))
    made = PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), **special)
    made.add_special_tokens({"additional_special_tokens": list(add)})
    if pad:
        made.pad_token = pad
    made.save_pretrained(place)
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | {"vocab_size": len(made)}))
    found = templates.load_tokenizer(place)
    row = encoding.encode_row(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}, found
    )
    assert row["labels"][-1] == found.eos_token_id  # the end token has loss, whatever pads
    return templates.padding_note(found)


def changed_and_saved(folder, generation=None, **config):
    "Whether a model with other settings reads as before, saved and opened again too."
    place, ids = copied(folder, **config), torch.arange(5, 20)[None]
    eager = models.load_model(place, "cpu", attn_implementation="eager").config
    assert eager._attn_implementation == "eager"
    if generation:
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]} | generation))
    seen_before(place)
    network, tokenizer = open_model(place, "cpu")
    ends = network.generation_config.eos_token_id
    saved = models.load_model(models.save_model(network, tokenizer, folder / "plain"), "cpu")
    with torch.no_grad():
        wanted = models.load_model(BASE, "cpu")(ids).logits
        return f"{all(torch.equal(other(ids).logits, wanted) for other in (network, saved))} {ends}"


def sampled_freely(folder):
    "What a policy's sampling takes from the settings beside its model."
    place = copied(folder)
    (place / "generation_config.json").write_text('{"eos_token_id": 1, "no_repeat_ngram_size": 2}')
    settings = grpo._policy(place, device.TrainRun(0))[0].generation_config
    return settings.no_repeat_ngram_size, settings.eos_token_id


def asked_and_answered(folder, template):
    "The prompt and the answer of a row under a template, and the prompt of its question alone."
    found = templates.load_tokenizer(BASE)
    found.own_template = template
    templates.with_template(found, "own")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    row = encoding.encode_row({"messages": turns}, found)
    length = len(encoding.encode_prompt(turns[:1], found))
    return [found.decode(part) for part in (row["input_ids"][:length], row["labels"][length:])]


def beyond(folder, token, template=None, **kind):
    "A token beyond the model's last vector, for a padding token, for pictures, or for turns."
    place = copied(folder)
    made = AutoTokenizer.from_pretrained(place)
    made.add_special_tokens({"additional_special_tokens": [token]} if not kind else kind)
    made.chat_template = template or made.chat_template
    made.save_pretrained(place)
    seen_before(place)
    return opened(place)


def not_named_none(folder):
    "The begin and unknown tokens of a tokenizer that names none, of a vocabulary with the word None."
    place = copied(folder)
    file, own = place / "tokenizer_config.json", place / "tokenizer.json"
    content = json.loads(own.read_text())
    token = next(token for token in content["model"]["vocab"] if token.isalpha() and len(token) == 4)
    content["model"]["vocab"]["None"] = content["model"]["vocab"].pop(token)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if token not in "".join(pair)]
    own.write_text(json.dumps(content))
    settings = json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}
    file.write_text(json.dumps(settings))
    made = templates.load_tokenizer(place)
    return made.convert_tokens_to_ids("None") > 0, made.bos_token, made.unk_token


def named_after_its_kind(folder):
    "Whether code of a class of their own is refused, of kinds that the library opens as another."
    kinds = {
        "internlm3": "InternLM3ForCausalLM",
        "gpt2": "GPT2LMHeadCustomModel",
        "llama": "LlamaForCausalLM",
    }
    auto = lambda name: {"AutoModelForCausalLM": f"modeling.{name}"}
    return [model_checks._replaced({"model_type": k, "auto_map": auto(n)}) for k, n in kinds.items()]


def never_resized(folder):
    "An adapter whose tokenizer got a padding token, and whose base no vector for it."
    place = adapter(folder)
    made = AutoTokenizer.from_pretrained(BASE)
    made.add_special_tokens({"pad_token": "[PAD]"})
    made.save_pretrained(place)
    adapters.check_adapter(place, "mine", BASE, "the base")
    return adapters.open_adapter(place, "mine", "cpu")[1].pad_token


def cut_as_its_file_says(folder, named, kind="llama"):
    "Whether texts become the tokens of tokenizer.json, opened and saved, under a class of other habits."
    place = copied(folder, model_type=kind, architectures=[])
    file = place / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": named}))
    text = "In 2024, 12 cows and 100 hens weren't fed."
    wanted = Tokenizer.from_file(str(place / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    first = templates.load_tokenizer(place)
    templates.save_tokenizer(first, place)
    return [
        (found.encode(text, add_special_tokens=False), found.eos_token, found.pad_token)
        == (wanted, END, templates.PAD)
        for found in (first, templates.load_tokenizer(place))
    ]


RARE = {
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "Vera": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "VBLoRA": {"r": 2, "num_vectors": 16, "vector_length": 16, "target_modules": ["q_proj"]},
    "AdaLora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "OFT": {"oft_block_size": 4},
    "Shira": {"r": 2},
    "LNTuning": {"target_modules": ["input_layernorm"]},
}
END, BEGIN = templates.END, templates.BEGIN
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
KINDS = ("awq", "fp8", "compressed-tensors", "mxfp4", "hqq", "torchao")
CASES = [
    Case(
        "half a model",
        "refused: .*18 more|refused: .*17 more are in the files",
        lambda f: opened(copied(f, num_hidden_layers=2)),
    ),
    Case(
        "half a model, before stage 1",
        "refused: .*more are in the files",
        lambda f: seen_before(copied(f, num_hidden_layers=2)),
    ),
    Case(
        "more layers than the files",
        "refused: .*random numbers",
        lambda f: seen_before(copied(f, num_hidden_layers=6)),
    ),
    Case(
        "another width",
        "refused: .*other sizes.*restore",
        lambda f: seen_before(copied(f, intermediate_size=300)),
    ),
    Case("weights NaN", "refused: .*no numbers", lambda f: opened(altered(f, spoiled))),
    Case("weights NaN, before stage 1", "refused: .*no numbers", lambda f: seen_before(altered(f, spoiled))),
    Case(
        "one Inf in the second shard, before stage 1",
        r"refused: .*no numbers \(model.norm.weight: 1 of",
        sharded,
    ),
    Case(
        "weights in integers",
        "refused: .*stored as I8",
        lambda f: seen_before(altered(f, lambda w: {k: v.to(torch.int8) for k, v in w.items()})),
    ),
    Case(
        "rotary tables left in the files",
        "ok: ",
        lambda f: opened(
            altered(f, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
        ),
    ),
    Case("code beside the weights", "refused: .*never done", remote),
    Case("code beside the tokenizer", "refused: .*never done|ok: ", remote_tokenizer),
    Case("GPTQ", r"refused: .*gptq \(4 bits\).*16-bit", lambda f: opened(copied(f, **GPTQ))),
    *(
        Case(
            f"quantised by {kind}",
            f"refused: .*{kind}",
            lambda f, kind=kind: seen_before(copied(f, quantization_config={"quant_method": kind})),
        )
        for kind in KINDS
    ),
    Case("bitsandbytes 4 bits", "ok: True", dequantised),
    Case("bitsandbytes 8 bits", "ok: True", partial(dequantised, eight=True)),
    Case(
        "tokenizer larger than the embedding",
        "refused: .*tokens and the model only",
        lambda f: (
            lambda p: (AutoTokenizer.from_pretrained(p).add_tokens(["a"]), _more_tokens(p), seen_before(p))[
                -1
            ]
        )(copied(f)),
    ),
    Case(
        "adapter whose keys match nothing",
        "refused: .*56 of its weights are missing.*56 of the 56",
        lambda f: opened(
            adapter(
                f, change=partial(renamed, old="base_model.model.", new="base_model.model.base_model.model.")
            )
        ),
    ),
    Case(
        "adapter of a language_model prefix",
        "refused: .*unused",
        lambda f: opened(
            adapter(f, change=partial(renamed, old="model.layers", new="language_model.layers"))
        ),
    ),
    Case(
        "half an adapter",
        "refused: .*28 of its weights are missing",
        lambda f: opened(adapter(f, change=half)),
    ),
    Case(
        "empty adapter",
        "refused: .*56 of its weights are missing",
        lambda f: opened(adapter(f, change=lambda w: {})),
    ),
    Case(
        "adapter of other shapes",
        "refused: .*does not fit",
        lambda f: opened(adapter(f, change=lambda w: {k: v.repeat(2, 1) for k, v in w.items()})),
    ),
    Case("adapter NaN", "refused: .*no numbers", lambda f: opened(adapter(f, change=spoiled))),
    Case(
        "prompt tuning",
        "refused: .*PROMPT_TUNING",
        lambda f: opened(adapter(f, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))),
    ),
    Case(
        "adapter without a base", "refused: .*does not name its base", lambda f: opened(adapter(f, base=""))
    ),
    Case(
        "adapter whose base is away",
        "refused: .*not on this machine",
        lambda f: opened(adapter(f, base="/nowhere/base")),
    ),
    Case("LoRA", "ok: True", merged),
    Case("DoRA", "ok: True", partial(merged, use_dora=True)),
    Case(
        "rsLoRA with rank patterns", "ok: True", partial(merged, use_rslora=True, rank_pattern={"q_proj": 4})
    ),
    Case("LoRA with a saved head", "ok: True", partial(merged, modules_to_save=["embed_tokens"])),
    *(
        Case(f"{kind} adapter", "ok: True", partial(as_trained, kind=kind, **settings))
        for kind, settings in RARE.items()
    ),
    Case("PiSSA", "ok: True", partial(as_trained, init_lora_weights="pissa")),
    Case(
        "LoRA on a tied embedding", "ok: True", partial(as_trained, target_modules=["embed_tokens", "q_proj"])
    ),
    Case(
        "PiSSA by a random method",
        "refused: .*ADAPTER .*pissa_niter_2.*not in its files",
        partial(as_trained, init_lora_weights="pissa_niter_2"),
    ),
    Case("bias on layers without one", "refused: .*ADAPTER adds a bias", partial(as_trained, lora_bias=True)),
    *(
        Case(
            f"{kind} adapter",
            "refused: .*cannot be merged",
            partial(as_trained, kind=kind, num_virtual_tokens=4),
        )
        for kind in ("PrefixTuning", "PromptEncoder")
    ),
    *(
        Case(f"{name} in an adapter with more tokens", "ok: True", partial(with_more_tokens, **settings))
        for name, settings in (
            ("a whole embedding", {"modules_to_save": ["embed_tokens", "lm_head"]}),
            ("an adapted embedding", {"target_modules": ["embed_tokens", "lm_head"]}),
            ("Pythia's embedding", {"kind": "gpt_neox", "modules_to_save": ["embed_in", "embed_out"]}),
        )
    ),
    Case(
        "an adapter of a way that PEFT does not know yet",
        "refused: .*use_newest, which .* leave out: pip",
        lambda f: opened(with_setting(adapter(f), use_newest=True)),
    ),
    Case(
        "tokens in an adapter that have no vector",
        "refused: .*no vector",
        partial(with_more_tokens, tokens=0),
    ),
    Case("given adapter of the base", "ok: world:base", lambda f: given(f, str(BASE))),
    Case(
        "given adapter of another base", "refused: .*neither models.base", lambda f: given(f, "owner/other")
    ),
    Case("base of an adapter trained again", "ok: True", trained_again),
    Case(
        "pad is end, no spare",
        "ok: .*the end token",
        lambda f: tokenizer(f, END, eos_token=END, bos_token=BEGIN),
    ),
    Case(
        "no pad, reserved token",
        r"ok: <\|reserved_special_token_2\|>, a spare",
        lambda f: tokenizer(f, None, ["<|reserved_special_token_2|>"], eos_token=END),
    ),
    Case(
        "no pad, unknown token",
        "ok: <unk>, the unknown",
        lambda f: tokenizer(f, None, eos_token=END, unk_token="<unk>"),
    ),
    Case(
        "pad is end, endoftext spare",
        r"ok: <\|endoftext\|>, a spare",
        lambda f: tokenizer(f, END, ["<|endoftext|>"], eos_token=END),
    ),
    Case("no end token", "refused: .*no end token", lambda f: tokenizer(f)),
    Case(
        "code of another class for a kind that is known",
        "refused: .*never done",
        lambda f: opened(copied(f, auto_map={"AutoModelForCausalLM": "modeling_my.MyLlamaForCausalLM"})),
    ),
    Case(
        "code of the class that is known",
        "ok: ",
        lambda f: opened(copied(f, auto_map={"AutoModelForCausalLM": "a/b--my.LLaMAForCausalLM"})),
    ),
    Case(
        "a padding number beyond the vectors",
        "refused: .*Padding_idx",
        lambda f: seen_before(copied(f, pad_token_id=99_999)),
    ),
    *(
        Case(name, rf"ok: True {ends}", partial(changed_and_saved, **settings))
        for name, ends, settings in (
            (
                "a temperature without sampling",
                r"\[1, 5\]",
                {"generation": {"do_sample": False, "temperature": 0.7}},
            ),
            (
                "a kernel of another package in config.json",
                "1",
                {"_attn_implementation": "flash_attention_2"},
            ),
            ("tuples in config.json", "1", {"return_dict": False}),
        )
    ),
    *(
        Case(
            f"a template without a generation prompt, {name}",
            wanted,
            partial(asked_and_answered, template=text),
        )
        for name, wanted, text in (
            (
                "with a header",
                r"ok: \['user\\nHi<\|end_of_text\|>assistant\\n', 'Yes<\|end_of_text\|>'\]",
                "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}",
            ),
            (
                "without a header",
                r"ok: \['\[Hi\]', ' Yes<\|end_of_text\|>'\]",
                "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content +"
                " eos_token }}{% endfor %}",
            ),
        )
    ),
    Case("n-grams forbidden beside a policy", r"ok: \(None, \[1\]\)", sampled_freely),
    Case("a picture token without a vector", "ok: ", partial(beyond, token="<image_soft_token>")),
    Case(
        "a padding token without a vector",
        r"ok: .*padding <\|finetune_right_pad_id\|>, a spare",
        partial(beyond, token="[PAD]", pad_token="[PAD]"),
    ),
    Case("an adapter's padding token without a vector", r"ok: <\|finetune_right_pad_id\|>", never_resized),
    Case("no begin token and a word None", r"ok: \(True, None, None\)", not_named_none),
    Case("classes of their own", r"ok: \[False, True, False\]", named_after_its_kind),
    Case(
        "a turn token without a vector",
        "refused: .*no vector",
        partial(beyond, token="<|im_end|>", template="{{ messages[0].content }}<|im_end|>"),
    ),
    *(
        Case(
            f"{named} over another tokenizer.json",
            r"ok: \[True, True\]",
            partial(cut_as_its_file_says, named=named, kind=kind),
        )
        for named, kind in (
            ("GPT2Tokenizer", "llama"),
            ("Qwen2Tokenizer", "llama"),
            ("LlamaTokenizerFast", "qwen2"),
            ("CodeLlamaTokenizer", "llama"),
        )
    ),
]


def _more_tokens(place):
    made = AutoTokenizer.from_pretrained(place)
    made.add_tokens([f"more {i}" for i in range(50)])
    made.save_pretrained(place)


@pytest.mark.parametrize(**table(CASES))
def test_case(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong
