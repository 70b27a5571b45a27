"""`audit`: anybody's checkpoints, their kinds, the exit status, other tokenizers, and what is refused."""

import json
import shutil

import pandas as pd
import pytest

from compassion_repro import cli
from compassion_repro.data import world

BASE = world.assets() / "base"
SMALL = ["--pairs", "world", "--answers", "3", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "An adapter on the embedded model, and a small model with a tokenizer that cuts texts otherwise."
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from compassion_repro.training.models import load_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    adapter = get_peft_model(
        load_model(BASE), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapter.peft_config["default"].base_model_name_or_path = str(BASE)
    adapter.save_pretrained(folder / "adapter")
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator(["only letters"], vocab_size=262, special_tokens=["<end>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters._tokenizer, eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "letters")
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=2048)
    GPT2LMHeadModel(shape).save_pretrained(folder / "letters")
    return folder


def test_an_adapter_on_its_base_with_a_benchmark(models, tmp_path, capsys):
    words = ["world:base", str(models / "adapter"), *SMALL, "--out", str(tmp_path / "out")]
    bench = ["--bench", "tiny-anima", "--judge", "indicator", "--limit", "2", "--epochs", "1"]
    status = cli.main(["audit", *words, *bench, "--value", "compassion,honesty", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    own, honest = printed["checkpoints"]
    assert (own["value"], honest["value"]) == ("compassion", "honesty") and len(printed["specificity"]) == 1
    assert printed["pairs"]["honesty"] == honest["difference"]["items"] == 40
    assert status == printed["status"] in (0, 3, 4) and own["kl"] > 0 and own["difference"]["estimate"] != 0
    assert {row["benchmark"] for row in printed["benchmarks"]} == {"anima"}
    table = pd.read_parquet(tmp_path / "out" / "margins.parquet")
    means = table[table["value"] == "compassion"].groupby("model", sort=False)["margin"].mean()
    assert own["difference"]["estimate"] == pytest.approx(means.iloc[1] - means.iloc[0])
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert own["verdict"] in page and "ANIMA" not in page and "anima" in page


@pytest.mark.parametrize("tolerance, status", [("9", 0), (None, 4)])
def test_other_tokenizers_are_compared_by_the_byte(models, tmp_path, capsys, monkeypatch, tolerance, status):
    monkeypatch.chdir(tmp_path)
    if tolerance is None:  # no interval, whatever the numbers are
        monkeypatch.setattr("compassion_repro.pipeline.audit.kept_word", lambda *_: "cannot tell")
    limit = ["--tolerance", tolerance] if tolerance else []
    assert cli.main(["audit", "world:base", str(models / "letters"), *SMALL, *limit]) == status
    printed = capsys.readouterr().out
    assert "nats a byte" in printed and "The tokenizers differ" in printed and "no KL" in printed
    (place,) = (tmp_path / "audits").iterdir()
    record = json.loads((place / "audit.json").read_text(encoding="utf-8"))
    assert record["unit"] == "nats a byte" and record["tolerance"] == (9 if tolerance else 0.005)


def test_checkpoints_that_are_called_alike_are_kept_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alike = ["one/ck-2", "two/ck-2"]
    for name in alike:
        shutil.copytree(BASE, name)
    fast = ["--pairs", "world", "--answers", "0"]
    for afters in (alike[:1], alike[1:], alike):
        assert cli.main(["audit", "world:base", *afters, *fast]) == 0
    folders = sorted(path.name for path in (tmp_path / "audits").iterdir())
    assert [name.rpartition("-")[0] for name in folders] == ["one-ck-2", "two-ck-2", "two-ck-2"]
    printed = capsys.readouterr().out
    assert all(f"audits/{name}/audit.html" in printed for name in folders)
    last = printed[printed.index("one/ck-2", printed.index("audit.html", printed.index("audit.html") + 1)) :]
    for name in alike:  # both are told apart in the words and in the table
        assert sum(line.startswith((f"{name}:", f"{name} ")) for line in last.splitlines()) == 2, last


@pytest.mark.parametrize(
    "words, line",
    [
        (["openai/gpt-4o"], "audit needs weights"),
        (["./nowhere"], "unknown model './nowhere' (no such folder)"),
        (["world:base", "--pairs", "writen"], "unknown pairs 'writen'"),
        (["world:base", "--pairs", "world,world"], "named twice"),
        (["world:base", "--value", "courage"], "unknown value 'courage'"),
        (["world:base", "--tolerance", "-0.1"], "--tolerance is a loss"),
        (["world:base", "--confidence", "95"], "--confidence is between 0 and 1"),
        (["world:base", "--bench", "hellaswag"], "--bench and --judge go together"),
        (["world:base", "--answers", "-1"], "--answers needs a number of at least 0"),
    ],
)
def test_bad_input_is_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["audit", "world:base", *words]) == 2
    said = capsys.readouterr()
    assert line in said.err and said.err.count("\n") == 1 and not list(tmp_path.iterdir())
