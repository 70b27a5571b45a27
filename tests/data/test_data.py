"""The loader on good, bad and hostile sources: nothing lost without a count, nothing raised but one clear
line.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.data.lengths import split_text
from compassion_repro.data.rows import load, read_rows, save_rows, train_held_out
from compassion_repro.data.turns import chat_row

SHARED = Path(
    os.environ.get("COMPASSION_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
)
needs_shared = pytest.mark.skipif(
    not (SHARED / "dolly_rows.jsonl").is_file(), reason="no folder of real sample rows"
)

DOLLY = {
    "instruction": "Who wrote it?",
    "context": "Emma is a novel by Jane Austen.",
    "response": "Jane Austen.",
    "category": "closed_qa",
}
CODE = {"instruction": "Add one to x.", "response": "def f(x):\n    return x + 1"}
PROMPT = {
    "dataset": "hh",
    "context": "[INST] Hi [/INST]",
    "id": 12,
    "context_messages": [
        {"content": "Hi", "role": "user"},
        {"content": "Hello.", "role": "assistant"},
        {"content": "Why?", "role": "user"},
    ],
}
ODD = [
    "naïve café",
    "🐙👩‍👩‍👧",
    "a\r\nb\r\n",
    "tab\tnull\x00bell\x07",
    "line\u2028sep\u2029\x85",
    "e\u0301 \u00e9",
    "العربية עברית",
    "\ufeffmark",
    '"quotes" \\n \\u0041',
    "  spaces  ",
]


def write(path, rows, end="\n"):
    path.write_bytes(
        b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + end.encode() for row in rows)
    )
    return path


def balanced(report):
    assert report.read == report.kept + sum(report.dropped.values()) + report.left_out
    return report


def assert_refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for word in words:
        assert word in message, message
    return message


# --- schemas and shapes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, schema, messages",
    [
        (DOLLY, "dolly", chat_row("Who wrote it?\n\nEmma is a novel by Jane Austen.", "Jane Austen.")),
        (DOLLY | {"context": ""}, "dolly", chat_row("Who wrote it?", "Jane Austen.")),
        (DOLLY | {"context": None}, "dolly", chat_row("Who wrote it?", "Jane Austen.")),
        (CODE, "magicoder", chat_row(CODE["instruction"], CODE["response"])),
        ({"prompt": "A?", "completion": "B."}, "prompt-completion", chat_row("A?", "B.")),
        (chat_row("A?", "B."), "messages", chat_row("A?", "B.")),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chat_schemas_in_every_file_kind(tmp_path, row, schema, messages, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    elif suffix == ".json":
        path.write_text(json.dumps([row, row], indent=1))
    else:
        write(path, [row, row])
    corpus = load(path, "messages")
    assert corpus.rows == [messages, messages]
    assert corpus.report.schemas == {schema: 2} and corpus.report.read == corpus.report.kept == 2


def test_rlhflow_rows_are_prompts(tmp_path):
    path = write(
        tmp_path / "prompts.jsonl", [PROMPT, PROMPT | {"context_messages": PROMPT["context_messages"][:2]}]
    )
    rows = load(path, "prompts").rows
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant", "user"] and rows[0][
        "id"
    ] == 12
    assert rows[1]["messages"] == [{"role": "user", "content": "Hi"}]  # the last answer is taken off
    report = load(path, "messages").report
    assert report.dropped == {"the conversation does not end with the assistant, but with the user": 1}


def test_code_rows_serve_as_prompts_and_keep_their_tests(tmp_path):
    path = write(tmp_path / "code.jsonl", [CODE | {"tests": "assert f(1) == 2", "id": "a", "license": "x"}])
    assert load(path, "prompts").rows == [
        chat_row("Add one to x.") | {"id": "a", "reference": CODE["response"], "tests": "assert f(1) == 2"}
    ]


@pytest.mark.parametrize("column", ["text", "document", "content"])
def test_documents(tmp_path, column):
    path = write(tmp_path / "documents.jsonl", [{column: "A memo.", "topic": 3}])
    assert load(path, "text").rows == [{"text": "A memo."}]
    assert_refused(lambda: load(path, "messages"), "a document where a conversation is wanted")


def test_columns_are_renamed_and_schema_can_be_given(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"body": "A memo.", "q": "A?", "a": "B."}])
    assert load(path, "text", columns={"text": "body"}).rows == [{"text": "A memo."}]
    assert load(path, "messages", columns={"prompt": "q", "completion": "a"}).rows == [chat_row("A?", "B.")]
    both = write(tmp_path / "both.jsonl", [CODE | {"text": "A memo."}])
    assert load(both, "text", schema="text").rows == [{"text": "A memo."}]
    assert_refused(lambda: load(both, "text", schema="dollie"), "dollie", "magicoder")


def test_mixed_schemas_are_read_row_by_row(tmp_path):
    rows = [DOLLY, CODE, {"text": "A memo."}, chat_row("A?", "B.")]
    report = balanced(load(write(tmp_path / "mixed.jsonl", rows), "any").report)
    assert report.schemas == {"dolly": 1, "magicoder": 1, "text": 1, "messages": 1} and report.kept == 4
    pq.write_table(
        pa.Table.from_pylist(
            [
                {name: row.get(name) for name in ("instruction", "context", "response", "text", "messages")}
                for row in rows
            ]
        ),
        tmp_path / "mixed.parquet",
    )
    assert load(tmp_path / "mixed.parquet", "any").rows == load(tmp_path / "mixed.jsonl", "any").rows


def test_unknown_schema_names_the_columns(tmp_path):
    path = write(tmp_path / "other.jsonl", [{"frage": "A?", "antwort": "B."}] * 3)
    assert_refused(lambda: load(path, "messages"), "antwort, frage", "instruction", "response", "text")
    assert_refused(
        lambda: load(write(tmp_path / "half.jsonl", [{"instruction": "A?"}] * 3), "messages"),
        "no answer beside instruction: 3",
    )
    assert_refused(lambda: load(write(tmp_path / "lines.jsonl", [{"a\nb": 1}]), "messages"), "a b")


# --- bad rows: each counted with its reason and place
# -----------------------------------------------------------------------

BAD = {
    "missing response": {"instruction": "A?", "context": ""},
    "empty response": CODE | {"response": " \n\t"},
    "response is not text": CODE | {"response": ["B."]},
    "empty instruction": CODE | {"instruction": ""},
    "missing instruction": CODE | {"instruction": None},
    "context is not text": DOLLY | {"context": {"a": 1}},
    "response is not sound Unicode": CODE | {"response": "\ud83d"},
    "missing content": {
        "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": None}]
    },
    "content is not text": {"messages": [{"role": "user", "content": 3}]},
    "empty messages": {"messages": []},
    "messages is not a list of turns": {"messages": "A?"},
    "messages has a turn without a known role ('oracle')": {
        "messages": [{"role": "oracle", "content": "A?"}]
    },
    "no question in the conversation": {"messages": [{"role": "assistant", "content": "B."}]},
    "the conversation does not end with the assistant, but with the user": chat_row("A?"),
    "a document where a conversation is wanted": {"text": "A memo."},
    "id, tests or reference cannot be written as JSON text": CODE | {"tests": "\udc00"},
    "not a JSON object": [1, 2],
    "not valid JSON": b'{"instruction": "A?", }\n',
    "not UTF-8": '{"instruction": "A?", "response": "café"}\n'.encode("latin-1"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_counted_with_its_line(tmp_path, reason):
    report = balanced(load(write(tmp_path / "rows.jsonl", [CODE, BAD[reason], CODE]), "messages").report)
    assert report.dropped == {reason: 1} and report.places == {reason: [2]} and report.kept == 2
    assert f"{reason}: 1 (line 2)" in str(report) and f"{reason}: 1 (line 2)" in report._repr_markdown_()


def test_all_bad_rows_at_once_and_alone(tmp_path):
    rows = list(BAD.values())
    report = balanced(load(write(tmp_path / "some.jsonl", [*rows, DOLLY]), "messages").report)
    assert set(report.dropped) == set(BAD) and report.kept == 1
    bad = [BAD[reason] for reason in ("not UTF-8", "missing content", "empty response")]
    assert_refused(
        lambda: load(write(tmp_path / "none.jsonl", bad), "messages"),
        "not UTF-8: 1 (line 1)",
        "missing content: 1 (line 2)",
        "empty response: 1 (line 3)",
    )


def test_only_the_first_places_are_listed(tmp_path):
    report = load(write(tmp_path / "rows.jsonl", [CODE] + [CODE | {"response": ""}] * 9), "messages").report
    assert report.dropped == {"empty response": 9} and report.places == {"empty response": [2, 3, 4, 5, 6]}
    assert "lines 2, 3, 4, 5, 6, ..." in str(report)


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_file_cut_off_loses_its_last_row_only(tmp_path, cut):
    whole = write(tmp_path / "whole.jsonl", [CODE | {"response": "é" * 30}] * 5).read_bytes().rstrip(b"\n")
    (tmp_path / "cut.jsonl").write_bytes(whole[:-cut])
    report = balanced(load(tmp_path / "cut.jsonl", "messages").report)
    assert report.kept == 4 and report.dropped == {"cut off: the file ends within the row": 1}


def test_no_final_line_feed_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CODE) + "\n" + json.dumps(CODE))
    assert load(path, "messages").report.kept == 2


def test_byte_order_mark_blank_lines_and_carriage_returns(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        [b"\xef\xbb\xbf", CODE, b"\r\n", b"  \r\n", DOLLY, b"\r\n", b"{\r\n"],
        end="\r\n",
    )
    report = balanced(load(path, "messages").report)
    assert report.read == 3 and report.kept == 2 and report.places == {"not valid JSON": [6]}
    (tmp_path / "array.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps([CODE]).encode())
    assert load(tmp_path / "array.json", "messages").report.kept == 1


def test_utf_16_is_told_not_guessed(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes((json.dumps(CODE) + "\n").encode("utf-16"))
    assert_refused(lambda: load(tmp_path / "rows.jsonl", "messages"), "not UTF-8 but UTF-16")


def test_deep_nesting_and_huge_numbers_are_bad_rows(tmp_path):
    rows = [b"[" * 10 + b'{"a":' * 100_000 + b"\n", b'{"id": ' + b"9" * 5000 + b"}\n", CODE]
    path = write(tmp_path / "rows.jsonl", [CODE, *rows])
    report = balanced(load(path, "messages").report)
    assert report.kept == 2 and sum(report.dropped.values()) == 2


def test_duplicates_are_kept(tmp_path):
    assert len(load(write(tmp_path / "rows.jsonl", [CODE] * 7), "messages")) == 7


def test_a_huge_row_is_kept_whole_without_a_length_and_split_with_one(tmp_path):
    text = "A sentence about hens. " * 100_000
    path = write(tmp_path / "rows.jsonl", [{"text": text}])
    assert load(path, "text").rows == [{"text": text}]
    corpus = load(path, "text", max_length=5000)
    assert (
        "".join(row["text"] for row in corpus.rows) == text
        and corpus.report.split == 1
        and corpus.report.rows == len(corpus) > 400
    )
    assert len({row["document"] for row in corpus.rows}) == 1


@pytest.mark.parametrize("text", ODD)
def test_text_comes_through_untouched(tmp_path, text):
    path = save_rows([{"text": text}, chat_row(text, text)], tmp_path / "rows.jsonl")
    corpus = load(path, "any")
    assert corpus.rows == read_rows(path) == [{"text": text}, chat_row(text, text)]
    pq.write_table(pa.Table.from_pylist([{"text": text}]), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet", "text").rows == [{"text": text}]


# --- files and folders that cannot be read
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nosuch.jsonl",
        "some/nosuch.jsonl",
        "/nosuch/rows",
        "../nosuch",
        "a b",
        "",
        "nosuch.parquet",
        "rows.csv",
        "a/b/c",
        "~/nosuch-rows",
    ],
)
def test_missing_file(name):
    assert_refused(lambda: load(name, "text"), "no such file or folder", "world:<name>")


def test_empty_files(tmp_path):
    for name, content in (
        ("empty.jsonl", b""),
        ("blank.jsonl", b"\n \n"),
        ("empty.json", b""),
        ("array.json", b"[]"),
        ("mark.jsonl", b"\xef\xbb\xbf"),
    ):
        (tmp_path / name).write_bytes(content)
        assert_refused(lambda: load(tmp_path / name, "text"), "holds no rows")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert_refused(lambda: load(tmp_path / "none.parquet", "text"), "holds no rows")
    (tmp_path / "empty.parquet").write_bytes(b"")
    assert_refused(lambda: load(tmp_path / "empty.parquet", "text"), "not a readable Parquet file")


def test_damaged_array_says_where(tmp_path):
    (tmp_path / "cut.json").write_text('[{"text": "one"},\n {"text": "tw')
    assert_refused(lambda: load(tmp_path / "cut.json", "text"), "line 2", ".jsonl")
    (tmp_path / "latin.json").write_bytes('[{"text": "café"}]'.encode("latin-1"))
    assert_refused(lambda: load(tmp_path / "latin.json", "text"), "not UTF-8 at byte 14")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    assert_refused(lambda: load(tmp_path / "deep.json", "text"), "deep.json")


def test_an_array_holds_bad_rows_too(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "one"}, None, "two", {"text": 2}]))
    report = balanced(load(tmp_path / "rows.json", "text").report)
    assert report.unit == "row" and report.places == {"not a JSON object": [2, 3], "text is not text": [4]}


def test_a_jsonl_file_may_hold_an_array_and_a_json_file_lines(tmp_path):
    (tmp_path / "array.jsonl").write_text(json.dumps([{"text": "one"}]))
    write(tmp_path / "lines.json", [{"text": "one"}, {"text": "two"}])
    assert (
        len(load(tmp_path / "array.jsonl", "text")) == 1 and len(load(tmp_path / "lines.json", "text")) == 2
    )


def test_unknown_kind_and_no_permission(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert_refused(lambda: load(tmp_path / "rows.xlsx", "text"), "unknown kind of file", ".jsonl", ".parquet")
    path = write(tmp_path / "locked.jsonl", [CODE])
    path.chmod(0)
    if not os.access(path, os.R_OK):
        assert_refused(lambda: load(path, "messages"), "cannot be read", "permissions")


def test_parquet_with_wrong_types(tmp_path):
    pq.write_table(pa.table({"instruction": ["A?", "B?"], "response": [1, 2]}), tmp_path / "numbers.parquet")
    assert_refused(
        lambda: load(tmp_path / "numbers.parquet", "messages"), "response is not text: 2 (rows 1, 2)"
    )
    pq.write_table(pa.table({"text": pa.array([b"bytes"])}), tmp_path / "bytes.parquet")
    assert_refused(lambda: load(tmp_path / "bytes.parquet", "text"), "text is not text")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "numbers.parquet").read_bytes()[:-9])
    assert_refused(lambda: load(tmp_path / "cut.parquet", "text"), "not a readable Parquet file")


def test_parquet_with_undecodable_text_loses_only_that_row(tmp_path):
    raw = pa.array([b"one", b"caf\xe9", b"three"]).cast(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    corpus = load(tmp_path / "rows.parquet", "text")
    assert [row["text"] for row in corpus.rows] == ["one", "three"] and corpus.report.places == {
        "not UTF-8": [2]
    }


def test_parquet_null_and_nested_null(tmp_path):
    rows = [chat_row("A?", "B."), {"messages": None}, {"messages": [None, None]}, chat_row("A?", "B.")]
    rows[3]["messages"][0]["content"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    report = balanced(load(tmp_path / "rows.parquet", "messages").report)
    assert report.kept == 1 and report.dropped == {
        "missing messages": 1,
        "messages has a turn without a known role": 1,
        "missing content": 1,
    }


def test_two_folders_of_one_name_are_two_corpora(tmp_path):
    for place, text in (("a", "first"), ("b", "second")):
        (tmp_path / place / "rows").mkdir(parents=True)
        write(tmp_path / place / "rows" / "train.jsonl", [{"text": text}])
        write(tmp_path / place / "rows" / "test.jsonl", [{"text": f"{text} test"}])
    assert [load(tmp_path / place / "rows", "text").rows[0]["text"] for place in "ab"] == ["first", "second"]
    assert load(tmp_path / "a" / "rows", "text", split="test").rows == [{"text": "first test"}]
    assert_refused(
        lambda: load(tmp_path / "a" / "rows", "text", split="dev"), "has no split 'dev'", "train, test"
    )
    write(tmp_path / "a" / "rows" / "train.jsonl", [{"text": "changed"}, {"text": "more"}])
    assert len(load(tmp_path / "a" / "rows", "text")) == 2


def test_empty_and_damaged_folder(tmp_path):
    assert_refused(lambda: load(tmp_path, "text"), "not a readable data folder")
    write(tmp_path / "train.jsonl", [b'{"text": "one"}\n{"te'])
    report = balanced(load(tmp_path, "text").report)
    assert report.kept == 1 and report.dropped == {"cut off: the file ends within the row": 1}
    (tmp_path / "train.jsonl").write_bytes(b"")
    assert_refused(lambda: load(tmp_path, "text"), "holds no rows")


def test_glob_characters_in_a_path(tmp_path):
    folder = tmp_path / "odd [1] *é"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["one"]}), folder / "rows[1].parquet")
    assert (
        load(folder / "rows[1].parquet", "text").rows
        == load(write(folder / "rows[2].jsonl", [{"text": "one"}]), "text").rows
    )


# --- the hub (more in test_hub.py, against a stand-in server)
# -----------------------------------------------------------------


def test_a_hub_id_without_network_is_one_line():
    code = (
        "from compassion_repro.data.rows import load; from compassion_repro.core.errors import"
        " InputError\ntry: load('databricks/databricks-dolly-15k', 'messages')\nexcept InputError as error:"
        " print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "nosuch-cache"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900
    ).stdout
    assert (
        said.count("\n") == 1
        and "databricks/databricks-dolly-15k@bdd27f4d94b9: it is not in the cache" in said
        and "--set data.sft-help=<folder>" in said
    )


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("someone/rows").mkdir(parents=True)
    write(Path("someone/rows/train.jsonl"), [{"text": "local"}])
    assert load("someone/rows", "text").rows == [{"text": "local"}]


# --- the embedded world
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", world.CORPORA)
def test_every_embedded_corpus_loads_whole(name):
    corpus = load(f"world:{name}", "any", limit=50, seed=3)
    assert (
        len(corpus) == corpus.report.read == 50
        and corpus.report.revision == "embedded"
        and not corpus.report.dropped
    )
    assert corpus.rows == load(f"world:{name}", "any", limit=50, seed=3).rows


def test_held_out_rows_of_an_embedded_corpus_are_other_rows(tmp_path):
    texts = lambda **options: {
        json.dumps(row) for row in load("world:documents", "text", limit=100, **options).rows
    }
    assert not texts() & texts(held_out=True) and not texts(seed=1) & texts(held_out=True)
    path = write(tmp_path / "rows.jsonl", [{"text": "A memo."}])
    assert_refused(lambda: load(path, "text", held_out=True), "train_held_out")


def test_unknown_embedded_corpus():
    assert_refused(lambda: load("world:nowhere", "text"), "world:documents", "world:help")


# --- length
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [len, lambda text: len(text.encode()), lambda text: len(text.split()), lambda text: (len(text) + 3) // 4],
)
def test_pieces_join_to_the_text_and_fit(measure):
    drawn = random.Random(5)
    for _ in range(60):
        text = "".join(
            drawn.choice(
                ["Hens rest. ", "A crab\n\n", "ox", " ", "\r\n\r\n", "鸡。", "x" * 30, "🐙", "Why? "]
            )
            for _ in range(drawn.randint(1, 60))
        )
        length = drawn.randint(4, 50)
        pieces = split_text(text, length, measure)
        assert "".join(pieces) == text and all(measure(piece) <= length for piece in pieces)


def test_cuts_prefer_paragraphs_then_sentences_then_words():
    assert split_text("One two. Three.\n\nFour five.", 20) == ["One two. Three.\n\n", "Four five."]
    assert split_text("One two three. Four five six.", 20) == ["One two three. ", "Four five six."]
    assert split_text("one two three four five six", 12) == ["one two ", "three four ", "five six"]


def test_a_measure_sees_little_of_a_huge_text():
    seen = []

    def measure(text):
        seen.append(len(text))
        return len(text)

    split_text("A sentence about hens. " * 50_000, 1000, measure)
    assert max(seen) <= 4000


def test_long_chat_rows_are_cut_and_counted(tmp_path):
    rows = [
        CODE,
        {"instruction": "Why?", "response": "So. " * 100},
        {"instruction": "Why? " * 100, "response": "So."},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    corpus = load(path, "messages", max_length=80)
    report = balanced(corpus.report)
    assert (report.kept, report.truncated, report.questions_cut, report.dropped) == (3, 2, 1, {})
    assert "2 truncated to 80 (751 cut away), 1 with a cut question" in str(report)
    assert all(sum(len(turn["content"]) for turn in row["messages"]) <= 80 for row in corpus.rows)
    assert (
        corpus.rows[0] == chat_row(CODE["instruction"], CODE["response"])
        and corpus.rows[2]["messages"][1]["content"] == "So."
    )
    report = balanced(load(path, "messages", max_length=80, long_prompts="drop").report)
    assert (report.kept, report.truncated, report.questions_cut, report.dropped) == (
        2,
        1,
        0,
        {"prompt too long": 1},
    )
    assert load(path, "prompts", max_length=80, long_prompts="drop").report.dropped == {"prompt too long": 1}


def test_earlier_turns_are_never_cut(tmp_path):
    turns = [
        {"role": "system", "content": "s" * 50},
        {"role": "user", "content": "u" * 10},
        {"role": "assistant", "content": "a" * 10},
    ]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}, CODE])
    corpus = load(path, "messages", max_length=60)
    assert (
        corpus.rows[0]["messages"][0]["content"] == "s" * 50
        and corpus.report.questions_cut == 1
        or corpus.report.dropped
    )
    assert load(path, "messages", max_length=50).report.dropped == {"prompt too long": 1}


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(limit=0), "limit is 0"),
        (dict(max_length=-1), "max_length is -1"),
        (dict(shape="chat"), "shape 'chat'"),
        (dict(long_prompts="keep"), "long_prompts 'keep'"),
        (dict(schema="x"), "schema 'x'"),
    ],
)
def test_choices_are_checked(tmp_path, options, words):
    path = write(tmp_path / "rows.jsonl", [CODE])
    assert_refused(lambda: load(path, **({"shape": "messages"} | options)), words)


# --- limit and seed
# ------------------------------------------------------------------------------------------------------------


def test_a_limit_draws_by_content_and_seed(tmp_path):
    rows = [{"text": f"Document {number}."} for number in range(200)]
    texts = lambda name, **options: [row["text"] for row in load(tmp_path / name, "text", **options).rows]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "other.jsonl", random.Random(1).sample(rows, 200))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    drawn = texts("rows.jsonl", limit=50)
    assert set(drawn) == set(texts("other.jsonl", limit=50)) and drawn == texts("rows.parquet", limit=50)
    assert drawn == sorted(drawn, key=lambda text: int(text[9:-1]))  # in the order of the source
    assert set(texts("rows.jsonl", limit=20)) < set(drawn) != set(texts("rows.jsonl", limit=50, seed=1))
    assert texts("rows.jsonl", limit=200) == texts("rows.jsonl", limit=999) == texts("rows.jsonl")
    assert balanced(load(tmp_path / "rows.jsonl", "text", limit=50).report).left_out == 150


def test_a_limit_is_filled_with_rows_that_fit(tmp_path):
    rows = [
        {"instruction": "Why? " * (20 if number % 2 else 1), "response": f"Because of {number}."}
        for number in range(40)
    ]
    report = balanced(
        load(
            write(tmp_path / "rows.jsonl", rows), "messages", limit=15, max_length=60, long_prompts="drop"
        ).report
    )
    assert report.kept == 15 and report.dropped["prompt too long"] > 0


# --- saving and dividing
# ---------------------------------------------------------------------------------------------------------


def test_save_is_whole_or_not_at_all(tmp_path):
    path = save_rows([{"text": "old"}], tmp_path / "rows.jsonl")

    def interrupted():
        yield {"text": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_rows(interrupted(), path)
    assert read_rows(path) == [{"text": "old"}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_save_reports_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    assert_refused(lambda: save_rows([], tmp_path / "no" / "rows.jsonl"), "cannot be written")
    (tmp_path / "file").write_text("")
    assert_refused(lambda: save_rows([], tmp_path / "file" / "rows.jsonl"), "cannot be written")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(
        lambda: save_rows([{"text": "x"}], tmp_path / "rows.jsonl"), "No space left", "free some space"
    )
    assert os.listdir(tmp_path) == ["file"]


def test_the_fingerprint_is_that_of_the_saved_file(tmp_path):
    corpus = load(write(tmp_path / "in.jsonl", [CODE, DOLLY]), "messages")
    path = save_rows(corpus.rows, tmp_path / "rows.jsonl")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == corpus.report.sha256
    assert load(path, "messages").report.sha256 == corpus.report.sha256


def test_read_rows_refuses_damage(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"te')
    assert_refused(lambda: read_rows(tmp_path / "rows.jsonl"), "line 2", "run again")
    assert_refused(lambda: read_rows(tmp_path / "nosuch.jsonl"), "cannot be read")


def test_held_out_rows_share_no_text_with_training_rows(tmp_path):
    drawn = random.Random(2)
    rows = [{"text": f"Document {drawn.randint(0, 60)}."} for _ in range(300)]
    for held_out, seed in ((0.1, 0), (0.5, 1), (37, 2), (1, 3)):
        train, held = train_held_out(rows, held_out, seed)
        assert len(train) + len(held) == 300 and not {row["text"] for row in train} & {
            row["text"] for row in held
        }
        assert abs(len(held) - (held_out * 300 if held_out < 1 else held_out)) <= 3
        assert (train, held) == train_held_out(rows, held_out, seed)
    shuffled = drawn.sample(rows, 300)
    key = lambda some: sorted(row["text"] for row in some)
    assert key(train_held_out(shuffled, 37)[1]) == key(train_held_out(rows, 37)[1])


def test_pieces_of_one_document_stay_together(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [{"text": f"Memo {number}. It is calm here. " * 5} for number in range(30)]
    )
    corpus = load(path, "text", max_length=60)
    train, held = train_held_out(corpus.rows, 0.2)
    assert held and not {row["document"] for row in train} & {row["document"] for row in held}


@pytest.mark.parametrize(
    "rows, held_out",
    [
        ([{"text": "same"}] * 5, 2),
        ([{"text": "one"}], 0.5),
        ([{"text": "a"}, {"text": "b"}], 2),
        ([{"text": "a"}, {"text": "b"}], 0.01),
        ([], 0.5),
    ],
)
def test_a_division_with_an_empty_side_is_refused(rows, held_out):
    assert_refused(lambda: train_held_out(rows, held_out), "cannot be held out")


# --- real rows
# -----------------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    "name, count, schema", [("dolly_rows", 75, "dolly"), ("code_rows", 300, "magicoder")]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 200},
        {"max_length": 64, "measure": lambda text: len(text.encode())},
        {"limit": 9999},
    ],
)
def test_real_rows_load_with_none_lost(name, count, schema, options, tmp_path):
    corpus = load(SHARED / f"{name}.jsonl", "messages", **options)
    assert json.loads(json.dumps(corpus.report.as_dict()))["rows"] == count
    assert corpus.report.read == corpus.report.kept == len(corpus) == count and corpus.report.schemas == {
        schema: count
    }
    assert read_rows(save_rows(corpus.rows, tmp_path / "rows.jsonl")) == corpus.rows
    assert len(load(SHARED / f"{name}.jsonl", "prompts", **options)) == count


@needs_shared
def test_real_rows_keep_their_text():
    for line, row in zip(
        (SHARED / "dolly_rows.jsonl").read_text(encoding="utf-8").split("\n"),
        load(SHARED / "dolly_rows.jsonl", "messages").rows,
    ):
        raw = json.loads(line)
        question = raw["instruction"] + ("\n\n" + raw["context"] if raw["context"] else "")
        assert row == chat_row(question, raw["response"])


# --- tokens: every one accounted for
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from compassion_repro.training.templates import load_tokenizer

    return load_tokenizer(world.assets() / "base")


def accounted(path, shape, tokenizer, length, longest):
    "The account of a file's tokens, and what the loader says of its rows."
    from compassion_repro.training.tokens import account_tokens

    corpus = load(str(path), shape)
    measure = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return account_tokens(corpus.rows, tokenizer, length, longest, measure), corpus.report


def assert_accounted(account, report):
    assert account.tokens_in == account.trained + account.masked + account.truncated and account.trained > 0
    assert account.rows + account.dropped_rows == report.rows == report.kept and balanced(report)
    assert account.rows - account.split_rows <= account.ends <= account.rows
    assert 0 < account.room <= 1


@needs_shared
@pytest.mark.parametrize(
    "name, schema, rows", [("dolly_rows.jsonl", "dolly", 75), ("code_rows.jsonl", "magicoder", 300)]
)
@pytest.mark.parametrize("length, cut", [(2048, False), (2048, True), (256, False), (256, True)])
def test_every_token_of_the_real_rows_is_accounted_for(tokenizer, name, schema, rows, length, cut):
    from compassion_repro.study import Training
    from compassion_repro.training.sft import longest_answer

    longest = longest_answer(world.assets() / "base", Training(length=length))["max_length"] if cut else None
    account, report = accounted(SHARED / name, "messages", tokenizer, length, longest)
    assert report.schemas == {schema: rows} and report.read == rows
    assert_accounted(account, report)
    if cut:
        assert account.split_rows == 0 and account.ends == account.rows
    else:
        assert account.truncated == 0
    # the case is there at all
    if length == 256:
        assert (account.truncated_rows if cut else account.split_rows) > 0


@needs_shared
@pytest.mark.parametrize("name", ["dolly_rows.jsonl", "code_rows.jsonl"])
def test_a_stage_accounts_for_its_real_rows(tokenizer, name):
    """As a supervised stage does it: rows drawn, cut and divided by the loader; what was cut is found again
    in the source, token for token.
    """
    from compassion_repro.pipeline.stages import training_rows
    from compassion_repro.study import Training
    from compassion_repro.training.encoding import encode_row
    from compassion_repro.training.sft import longest_answer
    from compassion_repro.training.tokens import stage_account

    start, source = world.assets() / "base", str(SHARED / name)
    fit = longest_answer(start, Training(length=256))
    rows, _, report = training_rows(source, "messages", None, 10, 1, 60, **fit)
    account = stage_account(rows, start, 256, "plain", source, 1, report["truncated"], **fit)
    kept = sum(len(encode_row(row, tokenizer)["input_ids"]) for row in rows)
    assert (
        account["tokens_in"] == account["trained"] + account["masked"] + account["truncated"]
        and account["trained"] + account["masked"] == kept
    )
    assert (
        account["rows"] == len(rows)
        and account["truncated_rows"] > 0
        and account["split_rows"] == account["dropped_rows"] == 0
        and account["ends"] == len(rows)
    )


def test_the_manifests_of_a_study_account_for_every_token(finished):
    from compassion_repro.store.folder import Study

    results = {
        m["stage"]: m["result"] for m in Study(finished).manifests() if m["kind"] in ("midtrain", "sft")
    }
    assert {"mid", "sft-help", "sft-code@base"} <= set(results)
    for done in results.values():
        account = done["account"]
        assert (
            account["tokens_in"] == account["trained"] + account["masked"] + account["truncated"]
            and account["truncated"] == 0
        )
        assert account["rows"] == done["rows"] and account["sequences"] == done["sequences"]
        assert done["tokens"] / done["passes"] == pytest.approx(
            account["trained"] + account["masked"], rel=0.01
        )


@needs_shared
def test_the_real_rows_serve_every_role(tokenizer):
    prompts = load(SHARED / "code_rows.jsonl", "prompts")
    assert len(prompts) == 300 and all(
        row["reference"].strip() and [t["role"] for t in row["messages"]] == ["user"] for row in prompts.rows
    )
    dolly = load(SHARED / "dolly_rows.jsonl", "messages")
    assert (
        all([t["role"] for t in row["messages"]] == ["user", "assistant"] for row in dolly.rows)
        and not dolly.report.dropped
    )


@pytest.mark.parametrize(
    "row", [DOLLY, CODE, {"text": "A memo about pens. " * 40}, chat_row("Why? " * 60, "So. " * 200)]
)
@pytest.mark.parametrize("length", [16, 64, 512])
def test_every_token_of_small_rows_is_accounted_for(tmp_path, tokenizer, row, length):
    shape = "text" if "text" in row else "messages"
    for longest in (None, max(4, length - 16)):
        path = write(tmp_path / "rows.jsonl", [row] * 3)
        account, report = accounted(path, shape, tokenizer, length, longest)
        assert_accounted(account, report)


def test_a_lost_token_would_be_seen(tokenizer, monkeypatch):
    from compassion_repro.training import supervised, tokens

    whole = supervised.pack
    monkeypatch.setattr(tokens, "pack", lambda rows, *more: whole(rows[:-1], *more))
    assert_refused(
        lambda: tokens.account_tokens([chat_row("Why?", "So.")] * 2, tokenizer, 64),
        "tokens went into the packing",
    )
    monkeypatch.setattr(tokens, "pack", whole)
    monkeypatch.setattr(
        tokens, "encode_rows", lambda rows, tokenizer: [{"input_ids": [1], "labels": [1]}] * len(rows)
    )
    assert_refused(
        lambda: tokens.account_tokens([chat_row("Why?", "So.")] * 2, tokenizer, 64), "went into the packing"
    )
