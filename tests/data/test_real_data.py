"""Real cases: rows as other people have them.

Each case makes its own small file and says what the loader made of it.
"""

import gzip
import json
import os
from math import nan
from pathlib import Path
from unittest import mock

import pytest
from cases import Case, problem, table

from compassion_repro.core.files import path_digest
from compassion_repro.data.rows import load, train_held_out

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
NO = {"role": "assistant", "content": "No."}
SYSTEM = [{"role": "system", "content": "Be."}, *TURNS]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


def lines(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def said(rows):
    "The first row as text: `user Why? | assistant So.`"
    row = rows[0]
    return (
        row["text"]
        if "text" in row
        else " | ".join(f"{turn['role']} {turn['content']}" for turn in row["messages"])
    )


def read(*rows, shape="messages", **options):
    "An action: load these rows; says the first row, then the account without its path."

    def act(folder):
        corpus = load({"path": str(lines(folder, rows)), **options}, shape)
        return f"{said(corpus.rows)} || {str(corpus.report).replace(str(folder), '')}"

    return act


def place(make, shape="messages", **options):
    "An action: load what `make` leaves in the folder."

    def act(folder):
        return said(load({"path": str(make(folder)), **options}, shape).rows)

    return act


def named(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def brackets(folder):
    for name in ("rows2", "rows[2]"):
        named(folder, f"{name}/train.jsonl", json.dumps({"instruction": name, "response": "x"}))
    return folder / "rows[2]"


def saved(folder, splits=False):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"instruction": "Why?", "response": "So."}])
    (DatasetDict(train=rows, test=rows) if splits else rows).save_to_disk(folder / "saved")
    return folder / "saved"


ROW = json.dumps({"instruction": "Why?", "response": "So."}) + "\n"
ONLY_A = "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n---\n"


def beside(shape="messages", **files):
    "An action: load a folder of these files; says the first row and the account."

    def act(folder):
        for name, content in files.items():
            named(folder, f"set/{name}", content)
        corpus = load(folder / "set", shape)
        return f"{said(corpus.rows)} || {corpus.report}"

    return act


def dated(folder):
    "Rows whose id is a date, as a Parquet file may hold it; the id is what is shown."
    import pandas as pd

    table = pd.DataFrame({"id": [pd.Timestamp("2020-01-01")], "text": ["one"]})
    table.to_parquet(folder / "a.parquet")
    named(folder, "b.txt", load(folder / "a.parquet", "text").rows[0]["id"])
    return folder / "b.txt"


def denied(folder):
    "A folder whose file only another user may read: root may, so the opening is made to fail."
    (place := named(folder, "set/a.jsonl", ROW)).chmod(0)
    open_ = Path.open

    def refuse(path, *more, **options):
        if path == place:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *more, **options)

    with mock.patch.object(Path, "open", refuse):
        return said(load(place.parent, "messages").rows)


def strangely_named(folder):
    "The identity of a folder with a file named in Latin-1, the file as the account names it, and the account."
    place = named(folder, "set/train.jsonl", ROW).parent
    (place / os.fsdecode(b"m\xe9re.jsonl")).write_text(ROW)
    report = load(place, "messages").report
    text = json.dumps(report.as_dict(), ensure_ascii=False)
    return f"{len(path_digest(place))} {report.files_not_read[0]} {text.encode().decode()}"


def thrice(folder):
    "The rows held out and trained on of ten rows, each there three times."
    rows = [{"messages": [{"role": "user", "content": str(n)}, TURNS[1]]} for n in range(10)] * 3
    parts = [train_held_out(rows, number) for number in (1, 3, 10)]
    assert not any(row in held for train, held in parts for row in train)
    return ", ".join(str([len(held), len(train)]) for train, held in parts)


def halves(folder):
    "Two texts, twenty times each: either would be half of the rows."
    return train_held_out([{"messages": TURNS}] * 20 + [{"messages": SYSTEM}] * 20, 5)


def repeated(folder):
    return train_held_out([{"messages": TURNS}] * 20, 5)


def configured(folder):
    named(folder, "set/a.jsonl", json.dumps({"instruction": "Why?", "response": "So."}))
    front = (
        "configs:\n- config_name: one\n  data_files: [{split: test, path: a.jsonl}]\n- config_name: two\n "
        " data_files: a.jsonl\n"
    )
    named(folder, "set/README.md", f"---\n{front}---\n")
    return folder / "set"


def annexed(folder):
    os.symlink("../.git/annex/objects/x", folder / "rows.jsonl")
    return folder / "rows.jsonl"


def opened(text, read=lambda tokenizer: "opened"):
    "An action: open a tokenizer that has this chat template; says what `read` makes of it."

    def act(folder):
        from transformers import AutoTokenizer

        from compassion_repro.data.world import assets
        from compassion_repro.training.templates import load_tokenizer

        own = AutoTokenizer.from_pretrained(assets() / "base")
        own.chat_template = text
        own.save_pretrained(folder)
        return read(load_tokenizer(folder, "own"))

    return act


def account(tokenizer):
    from compassion_repro.training.encoding import template_account

    return template_account(tokenizer)


def judged(folder):
    "How often the end token is in an answer that spells it out, as a reward model reads it."
    from compassion_repro.data.world import assets
    from compassion_repro.training.reward_model import encode_conversation
    from compassion_repro.training.templates import load_tokenizer

    tokenizer = load_tokenizer(assets() / "base")
    spelt = [TURNS[0], {"role": "assistant", "content": f"a {tokenizer.eos_token} b"}]
    same = (
        encode_conversation(tokenizer, TURNS)
        == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    )
    return same, encode_conversation(tokenizer, spelt).count(tokenizer.eos_token_id)


def begun(again):
    "An action: begin a study on a list of two files, then again on these."

    def act(folder):
        from compassion_repro.presets import load_preset
        from compassion_repro.store.folder import Study

        for name, said in (("a", "x"), ("b", "y"), ("moved", "x")):
            lines(folder, [{"instruction": said, "response": "z"}], f"{name}.jsonl")

        def preset(names):
            return load_preset(
                "tiny",
                ["data.sft-help=[" + ", ".join(f"{{path: {folder}/{name}.jsonl}}" for name in names) + "]"],
            )

        Study.create(folder / "study", preset(["a", "b"]))
        (folder / "study/seed-1/mid").mkdir(parents=True)
        Study.create(folder / "study", preset(again))
        return "the same study"

    return act


def templated(text, messages):
    "An action: this row through this chat template; says what was changed, and the row's text."

    def act(folder):
        from compassion_repro.data.world import assets
        from compassion_repro.training.encoding import check_row, encode_row
        from compassion_repro.training.templates import load_tokenizer

        tokenizer = load_tokenizer(assets() / "base")
        tokenizer.chat_template = text
        row, words = check_row({"messages": messages}, tokenizer)
        ids = encode_row(row, tokenizer)["input_ids"]
        return f"{words} ends {ids.count(tokenizer.eos_token_id)} {tokenizer.decode(ids)}"

    return act


LOOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must"
    " alternate') }}{% endif %}{% endfor %}" + LOOP
)
QA = r"ok: user Why\? \| assistant So\.( |$)"
NONE = r"refused: .*none of its 1 rows can be used.*"
CASES = [
    Case(
        "alpaca",
        r"ok: user Say\n\nhi \| assistant So\.",
        read({"instruction": "Say", "input": "hi", "output": "So."}),
    ),
    Case(
        "alpaca renamed, its input kept",
        r"ok: user Say\n\nhi \|",
        read({"instruction": "Say", "input": "hi", "response": "So."}),
    ),
    Case(
        "alpaca with the formatted text",
        QA,
        read({"instruction": "Why?", "input": "", "output": "So.", "text": "Below is"}),
    ),
    Case("sharegpt", QA, read({"conversations": SHARED})),
    Case(
        "sharegpt function turn",
        NONE + "'function'",
        read({"conversations": [{"from": "function", "value": "x"}, *SHARED]}),
    ),
    Case(
        "tool turn",
        NONE + "'tool'",
        read({"messages": [TURNS[0], {"role": "tool", "content": "x"}, TURNS[1]]}),
    ),
    Case(
        "tool call",
        NONE + "tool_calls",
        read({"messages": [*TURNS, TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [1]}]}),
    ),
    Case(
        "content parts",
        r"ok: user a\nb \|",
        read(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    },
                    TURNS[1],
                ]
            }
        ),
    ),
    Case(
        "image part",
        NONE + "image_url",
        read({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}),
    ),
    Case(
        "developer turn",
        r"ok: system Be\. \|",
        read({"messages": [{"role": "developer", "content": "Be."}, *TURNS]}),
    ),
    *[
        Case(f"{q} and {a}", QA, read({q: "Why?", a: "So."}))
        for q, a in (
            ("prompt", "answer"),
            ("question", "answer"),
            ("problem", "solution"),
            ("query", "response"),
            ("input", "output"),
        )
    ],
    Case("prompt and completion as turns", QA, read({"prompt": TURNS[:1], "completion": TURNS[1:]})),
    Case(
        "preference for a pair",
        r"ok: user Why\? \|\|",
        read({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, shape="pairs"),
    ),
    Case(
        "preference as whole conversations",
        r"ok: user Why\? \|\|",
        read(
            {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No."}]}, shape="pairs"
        ),
    ),
    *[
        Case(
            f"preference {name}",
            r"ok: system Be\. \| user Why\? \|\| .*1 kept",
            read({"chosen": "So.", "rejected": "No.", **row}, shape="pairs"),
        )
        for name, row in (
            ("with a column input", {"system": "Be.", "input": "Why?"}),
            ("with turns before it", {"conversations": [{"from": "system", "value": "Be."}, *SHARED[:1]]}),
            ("with its answers as a turn each", {"prompt": SYSTEM[:2], "chosen": TURNS[1], "rejected": NO}),
            (
                "beside the chosen conversation",
                {
                    "system": "Be.",
                    "prompt": "Why?",
                    "messages": TURNS,
                    "chosen": TURNS,
                    "rejected": [TURNS[0], NO],
                },
            ),
            (
                "with turns and another column before it",
                {"messages": [{"role": "system", "content": "Be."}, TURNS[0]], "input": "what it is about"},
            ),
            (
                "whose own system turn differs from a column",
                {
                    "system": "Bee.",
                    "chosen": [*SYSTEM[:1], *TURNS],
                    "rejected": [*SYSTEM[:1], TURNS[0], NO],
                },
            ),
            (
                "written as one dialogue",
                {
                    "system": "Be.",
                    "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                    "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
                },
            ),
        )
    ],
    Case(
        "preference without a question",
        NONE + "no question beside chosen and rejected",
        read({"chosen": "So.", "rejected": "No."}, shape="pairs"),
    ),
    Case(
        "dialogue whose last speaker is to answer",
        QA,
        read({"prompt": "\n\nHuman: Why?\n\nAssistant:", "response": "So."}),
    ),
    Case(
        "chosen dialogue mapped",
        QA,
        read(
            {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "x"}, columns={"messages": "chosen"}
        ),
    ),
    Case(
        "preference where one answer is needed",
        NONE + "response: chosen",
        read({"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
    ),
    Case(
        "preference mapped",
        QA,
        read(
            {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
            columns={"prompt": "prompt", "response": "chosen"},
        ),
    ),
    Case(
        "two answers",
        NONE + "could both be the answer",
        read({"prompt": "Why?", "answer": "So.", "response": "No."}),
    ),
    Case(
        "two answers, one named",
        QA + ".*not used: response",
        read({"prompt": "Why?", "answer": "So.", "response": "No."}, columns={"answer": "answer"}),
    ),
    Case(
        "column of another name",
        NONE + "no answer beside prompt.*reply",
        read({"prompt": "Why?", "reply": "So."}),
    ),
    Case(
        "columns mapped",
        QA,
        read({"frage": "Why?", "antwort": "So."}, columns={"instruction": "frage", "response": "antwort"}),
    ),
    Case(
        "columns mapped to what is not there",
        r"refused: .*no column 'nix'.*frage",
        read({"frage": "Why?"}, columns={"instruction": "nix"}),
    ),
    Case(
        "columns mapped from an unknown name",
        r"refused: .*'ask'.*does not know",
        read({"frage": "Why?"}, columns={"ask": "frage"}),
    ),
    Case(
        "system column",
        r"ok: system Be\. \| user Why",
        read({"system": "Be.", "instruction": "Why?", "output": "So."}),
    ),
    Case(
        "system column beside turns",
        r"ok: system Be\. \| user Why",
        read({"system": "Be.", "conversations": SHARED}),
    ),
    Case(
        "history in pairs",
        r"ok: user a \| assistant b \| user Why",
        read({"history": [["a", "b"]], "instruction": "Why?", "output": "So."}),
    ),
    Case(
        "history as text",
        NONE + "history is not a list",
        read({"history": "a b", "instruction": "Why?", "output": "So."}),
    ),
    Case(
        "choices",
        NONE + "needs its choices",
        read({"question": "Why?", "choices": ["a", "b"], "answer": "a"}),
    ),
    Case("tools", NONE + "needs its tools", read({"messages": TURNS, "tools": [{"name": "f"}]})),
    *[
        Case(
            f"marked {name}",
            QA + f".*1 dropped .*marked as a bad example .{name}",
            read(
                {"prompt": "Why?", "completion": "So.", name: good},
                {"prompt": "X", "completion": "Y", name: bad},
            ),
        )
        for name, good, bad in (
            ("label", True, False),
            ("label", 1, 0),
            ("label", "good", "bad"),
            ("weight", 1.0, 0),
            ("chosen", True, False),
            ("rejected", False, True),
            ("is_correct", "true", "false"),
        )
    ],
    Case(
        "classes are no marks",
        QA + ".*not used: label .3",
        read(*[{"prompt": "Why?", "completion": "So.", "label": n} for n in (1, 0, 2)]),
    ),
    Case(
        "weight of the last turn",
        NONE + "not to be learned",
        read({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}),
    ),
    Case(
        "unused columns named",
        QA + r".*columns not used: category \(1\), rating \(1\)",
        read({"instruction": "Why?", "response": "So.", "category": "a", "rating": 2}),
    ),
    Case(
        "rows under a key",
        QA,
        place(
            lambda f: named(
                f, "a.json", json.dumps({"version": 1, "data": [{"prompt": "Why?", "answer": "So."}]})
            )
        ),
    ),
    Case(
        "two lists",
        r"refused: .*several lists of rows \(a, b\)",
        place(lambda f: named(f, "a.json", json.dumps({"a": [{"x": 1}], "b": [{"x": 1}]}))),
    ),
    Case(
        "pandas columns",
        QA,
        place(lambda f: named(f, "a.json", json.dumps({"prompt": {"0": "Why?"}, "answer": {"0": "So."}}))),
    ),
    Case(
        "one conversation in a file",
        QA,
        place(lambda f: named(f, "a.json", json.dumps({"messages": TURNS}, indent=1))),
    ),
    Case("csv", QA, place(lambda f: named(f, "a.csv", "prompt,answer\nWhy?,So.\n"))),
    Case(
        "csv with semicolons and a mark",
        QA,
        place(lambda f: named(f, "a.csv", "\ufeffprompt;answer\r\nWhy?;So.\r\n")),
    ),
    Case(
        "csv with turns as text",
        QA,
        place(lambda f: named(f, "a.csv", 'id,messages\n1,"' + json.dumps(TURNS).replace('"', '""') + '"\n')),
    ),
    Case(
        "csv with an open quotation mark",
        r"refused: .*not a readable table",
        place(lambda f: named(f, "a.csv", 'prompt,answer\n"Why?,So.\nb,c\n')),
    ),
    Case("tsv", QA, place(lambda f: named(f, "a.tsv", "prompt\tanswer\nWhy?\tSo.\n"))),
    Case(
        "gz",
        QA,
        place(lambda f: named(f, "a.jsonl.gz", gzip.compress(json.dumps({"messages": TURNS}).encode()))),
    ),
    Case(
        "gz cut off",
        r"refused: .*cannot be read",
        place(lambda f: named(f, "a.jsonl.gz", gzip.compress(os.urandom(999))[:-9])),
    ),
    Case(
        "text files are documents",
        r"ok: one\n\ntwo",
        place(lambda f: named(f, "d/a.txt", "one\n\ntwo").parent, shape="text"),
    ),
    Case("folder named like a pattern", r"ok: user rows\[2\] ", place(brackets)),
    *[
        Case(f"folder with {name}", f"ok: user Why.*1 kept as 1 rows{unread}$", beside(**files))
        for name, unread, files in (
            ("rows of no split", ", files not read: more.jsonl", {"train.jsonl": ROW, "more.jsonl": ROW}),
            ("rows of another kind", ", files not read: b.csv", {"a.jsonl": ROW, "b.csv": "q,a\n"}),
            ("a backup", ", files not read: a.jsonl.bak", {"a.jsonl": ROW, "a.jsonl.bak": ROW}),
            ("another split", "", {"train.jsonl": ROW, "test.jsonl": ROW}),
            (
                "notes",
                "",
                {"a.jsonl": ROW, "README.md": "x", "CHANGES.md": "x", "NEWS.md": "x", "b.txt": "x"},
            ),
            ("what its README leaves out", "", {"a.jsonl": ROW, "b.jsonl": ROW, "README.md": ONLY_A}),
            ("a cache of a notebook", "", {"a.jsonl": ROW, ".ipynb_checkpoints/a-checkpoint.jsonl": ROW}),
            ("an ending in capitals", "", {"A.JSONL": ROW}),
        )
    ],
    Case(
        "folder of documents with a licence",
        "ok: one .*1 kept as 1 rows, files not read: LICENSE.txt$",
        beside(shape="text", **{"a.txt": "one", "LICENSE.txt": "mine"}),
    ),
    Case("save_to_disk", QA, place(saved)),
    Case("save_to_disk with splits", QA, place(lambda f: saved(f, True), split="test")),
    Case(
        "save_to_disk, no such split",
        r"refused: .*there are train, test",
        place(lambda f: saved(f, True), split="dev"),
    ),
    Case("configurations not chosen", r"refused: .*several configurations \(one, two\)", place(configured)),
    Case("configuration chosen", QA, place(configured, config="two")),
    Case("configuration and split chosen", QA, place(configured, config="one", split="test")),
    Case(
        "split of a configuration",
        r"refused: .*no split 'train' \(there are test\)",
        place(configured, config="one"),
    ),
    Case("no such configuration", r"refused: .*there are one, two", place(configured, config="three")),
    Case(
        "template without a system role",
        r"ok: \('the system turn folded.*user: Be\.\n\nWhy",
        templated(NO_SYSTEM, SYSTEM),
    ),
    Case(
        "template that drops the system turn",
        r"ok: \('the system turn folded.*user: Be\.\n\nWhy",
        templated("{% for m in messages if m.role != 'system' %}" + LOOP.partition("%}")[2], SYSTEM),
    ),
    Case("template that keeps it", r"ok: \(\) ends 1 system: Be", templated(LOOP, SYSTEM)),
    Case(
        "template that wants alternating roles",
        r"BadRow: .*must alternate",
        templated(ALTERNATE, [TURNS[0], *TURNS]),
    ),
    Case(
        "template that drops what is asked",
        r"BadRow: .*drops or rewrites a turn of the user",
        templated(LOOP.replace("m.content", "m.content[:1]"), TURNS),
    ),
    Case("broken template", r"BadRow: .*refuses these turns", templated("{% for m in messages %}", TURNS)),
    *[
        Case(
            f"template refused at the door: {name}",
            f"refused: .*{words}.*generation.template=plain",
            opened(text),
        )
        for name, text, words in (
            ("open loop", "{% for m in messages %}", "broken .*endfor"),
            ("unknown function", "{{ now() }}", "broken .*'now' is undefined"),
            ("no question", "hello", "does not show the question"),
            ("raises", "{{ raise_exception('tools only') }}", r"refuses a plain question \(tools only"),
        )
    ],
    Case(
        "template that adds a system turn",
        r"ok: \{'template_adds': 'You are Smol\.'\}",
        opened(
            "{% if messages[0].role != 'system' %}{{ bos_token + 'system You are Smol.' + eos_token }}{%"
            " endif %}" + LOOP,
            account,
        ),
    ),
    Case("template that adds nothing", r"ok: \{\}", opened("{{ bos_token }}" + LOOP, account)),
    Case(
        "template that tells the date by a variable",
        r"ok: \{'template_adds': '26 Jul 2024', 'template_day': '2024-07-26'\}",
        opened("{% set f = '%d %b %Y' %}{{ bos_token + strftime_now(f) + eos_token }}" + LOOP, account),
    ),
    Case("end token in what a reward model reads", r"ok: \(True, 1\)", judged),
    Case("study on the same rows in another file of the list", "ok: the same study", begun(["moved", "b"])),
    Case(
        "study on other rows in the list",
        "refused: .*another configuration .*data.sft-help",
        begun(["b", "moved"]),
    ),
    Case(
        "context beside turns", r"ok: user Why\?\n\nHere\. \|", read({"messages": TURNS, "context": "Here."})
    ),
    Case("context that the turns hold already", QA, read({"messages": TURNS, "context": "Why?"})),
    Case(
        "context beside several questions",
        NONE + "column context beside 2 questions",
        read({"messages": TURNS * 2, "context": "Here."}),
    ),
    Case(
        "template with the date",
        r"ok: .*26 Jul 2024",
        templated("{{ strftime_now('%d %b %Y') }}" + LOOP, TURNS),
    ),
    Case(
        "end token written in a turn",
        r"ok: \(\) ends 1 .*a <\|end_of_text\|> b<\|end_of_text\|>$",
        templated(LOOP, [TURNS[0], {"role": "assistant", "content": "a <|end_of_text|> b"}]),
    ),
    Case(
        "prompt with a special token",
        r"BadRow: .*'<\|end_of_text\|>' as text",
        templated(LOOP, [{"role": "user", "content": "<|end_of_text|>?"}]),
    ),
    Case(
        "git lfs",
        r"refused: .*git lfs pull",
        place(
            lambda f: named(
                f, "a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            )
        ),
    ),
    Case("missing cells as NaN", QA, read({"id": nan, "instruction": "Why?", "input": nan, "output": "So."})),
    Case(
        "answer that shows nothing",
        NONE + "empty answer",
        read({"prompt": "Why?", "answer": "\u200b\ufeff "}),
    ),
    *[
        Case(
            f"answer of a blank alone ({ord(blank):x})",
            NONE + "empty answer",
            read({"prompt": "Why?", "answer": blank}),
        )
        for blank in "\u2003\u2028\x85\u202f\u3000"
    ],
    Case("id that is a date", "ok: 2020-01-01 00:00:00", place(dated, shape="text")),
    Case(
        "turns that say more",
        QA + r".*not used: messages.name \(1\), messages.reasoning_content \(1\)$",
        read(
            {
                "messages": [
                    {**TURNS[0], "name": "Ann"},
                    {**TURNS[1], "reasoning_content": "Hm.", "refusal": None, "tool_calls": []},
                ]
            }
        ),
    ),
    Case(
        "json lines in UTF-16",
        r"refused: .*not UTF-8 but UTF-16",
        place(lambda f: named(f, "a.jsonl", ROW.encode("utf-16"))),
    ),
    Case(
        "json in UTF-16",
        r"refused: .*not UTF-8 but UTF-16",
        place(lambda f: named(f, "a.json", f"[{ROW}]".encode("utf-16-le").join((b"\xff\xfe", b"")))),
    ),
    Case("archive", r"refused: .*unknown kind of file", place(lambda f: named(f, "a.tar.gz", b"x"))),
    *[
        Case(f"csv {name}", wanted, place(lambda f, text=text: named(f, "a.csv", text)))
        for name, wanted, text in (
            ("with Excel's note of the separator", QA, "sep=;\r\nprompt;answer\r\nWhy?;So.\r\n"),
            ("with empty columns at its end", QA, "prompt,answer,,\nWhy?,So.,,\n"),
            (
                "with cells under no name",
                NONE + "a cell in a column without a name",
                "prompt,answer,,\nWhy?,So.,x,\n",
            ),
            ("with an index of pandas", QA, ",prompt,answer\n0,Why?,So.\n"),
            ("with empty lines above", QA, "\n\nprompt,answer\nWhy?,So.\n"),
            (
                "with a name of two lines",
                QA,
                '"prompt","answer","what\nelse"\n"Why?","So.",""\n',
            ),
            ("with spaces after its commas", QA, 'prompt, answer\n"Why?", "So."\n'),
            (
                "with a comma in a name",
                "ok: .*user Why. \\| assistant  So",
                'prompt,answer,"what, else"\nWhy?, So.,x\n',
            ),
            ("with two columns of a name", "refused: .*two columns have one name", "a,a\nb,c\n"),
        )
    ],
    Case(
        "folder with a file that may not be read", "refused: .*a.jsonl is damaged, it cannot be read", denied
    ),
    Case(
        "folder with a file whose name is not UTF-8",
        r"ok: 16 m\\udce9re.jsonl {.*[\\]+udce9re",
        strangely_named,
    ),
    Case(
        "system turn that says nothing",
        QA,
        read({"messages": [{"role": "system", "content": ""}, *TURNS]}),
    ),
    Case(
        "system turn alone",
        NONE + "empty messages",
        read({"system": "Be.", "messages": [{"role": "system", "content": ""}]}),
    ),
    Case(
        "alpaca without an input",
        QA,
        read({"instruction": "Why?", "input": "<noinput>", "output": "So."}),
    ),
    Case(
        "two answers of which one is better",
        NONE + "name both with columns: {chosen",
        read({"prompt": "Why?", "response_0": "So.", "response_1": "No."}, shape="pairs"),
    ),
    Case("every row three times", r"ok: \[3, 27\], \[3, 27\], \[9, 21\]", thrice),
    Case("one row many times", "refused: .*5 of 20 rows .1 different. cannot be held out", repeated),
    Case("two rows many times", "refused: .*5 of 40 rows .2 different. cannot be held out", halves),
    Case("git-annex", r"refused: .*git annex get", place(annexed)),
]


@pytest.mark.parametrize(**table(CASES))
def test_case(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong
