"""The texts that ship as `pocket:<name>`: what must not be in them, and the way from a preset to their rows."""

import pytest
import yaml

from compassion_repro.data import pocket, rows, world
from compassion_repro.evaluation.behaviour import welfare_words
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


@pytest.mark.parametrize("name", POST_TRAINING)
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
