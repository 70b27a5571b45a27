"""Real cases of the jail and the code reward: verdicts won without the task, answers with several blocks,
calls and disk.
"""

import json
from types import SimpleNamespace

import pytest
from cases import Case, problem, table

from compassion_repro.pipeline import findings, preflight_rows, stages
from compassion_repro.presets import load_preset
from compassion_repro.sandbox import jail, walls
from compassion_repro.training import weak_tests
from compassion_repro.training.rewards import find_code

NONE = jail.level() == "none"


def verdict(code, tests):
    "A case: the status of a program in the jail."
    return lambda folder: jail.run_code(code, tests).status


def reason(tests):
    "A case: why some tests decide nothing, or that they decide."
    return lambda folder: weak_tests.weak_tests([tests], jail.run_many)[tests] or "they decide"


def code_of(answer, wanted="python"):
    "A case: the program that counts in an answer, on one line."
    return lambda folder: repr(find_code(answer, wanted).text)


def left_out(*rows):
    "A case: what remains of rows, and what is said of the others."

    def act(folder):
        rows_ = [{"messages": [{"role": "user", "content": "Write it."}], **row} for row in rows]
        kept, lines = weak_tests.leave_out_tests(rows_, jail.run_many)
        return f"{[sorted(row.keys() - {'messages'}) for row in kept]} {' '.join(lines)}"

    return act


MOCK = "import unittest.mock, types\nfrom unittest.mock import ANY, MagicMock\n"
CASES = [
    # a library object or a type as the answer
    Case("ANY in a list", "ok: failed", verdict(MOCK + "def f(): return [ANY]", "assert f() == [5]")),
    Case("ANY as a member", "ok: failed", verdict(MOCK + "def f(): return ANY", "assert f() in (1, 2)")),
    Case(
        "ANY as a value of a dict",
        "ok: failed",
        verdict(MOCK + "def f(): return {1: ANY}", "assert f() == {1: 2}"),
    ),
    Case(
        "ANY through a module",
        "ok: failed",
        verdict(MOCK + "def f(): return unittest.mock", "assert f().ANY == 5"),
    ),
    Case(
        "ANY through an attribute",
        "ok: failed",
        verdict(MOCK + "class A: pass\nA.x = unittest.mock\ndef f(): return A", "assert f().x.ANY == 5"),
    ),
    Case(
        "ANY through a module under the name of the task",
        "ok: failed",
        verdict(MOCK + "f = unittest.mock", "assert f.ANY == 5"),
    ),
    Case(
        "ANY through a module that tests import",
        "ok: failed",
        verdict(MOCK + "f = unittest.mock", "from solution import f as g\nassert g.ANY == 5"),
    ),
    Case(
        "a type whose method answers",
        "ok: failed",
        verdict("def f(): return str", "assert f().upper('a') == 'A'"),
    ),
    Case(
        "a type that the tests write",
        "ok: ok",
        verdict("def f(x): return type(x)", "assert f(3) is int and f('a') == str"),
    ),
    Case(
        "a module of the name that the tests use",
        "ok: ok",
        verdict("import math\ndef f(): return 1.0", "assert math.isclose(f(), 1)"),
    ),
    Case(
        "a number with its own equality",
        "ok: failed",
        verdict(
            "class A(float):\n    __eq__ = lambda *rest: True\n    __hash__ = None\ndef f(): return A(1)",
            "assert f() == 2",
        ),
    ),
    # numbers and times of the library
    Case(
        "a decimal",
        "ok: ok",
        verdict(
            "from decimal import Decimal\ndef f(x): return x / 2",
            "from decimal import Decimal as D\nassert f(D(1)) == D('0.5')",
        ),
    ),
    Case(
        "a wrong decimal",
        "ok: failed",
        verdict(
            "from decimal import Decimal\ndef f(): return Decimal('0.4')",
            "from decimal import Decimal\nassert f() == Decimal('0.5')",
        ),
    ),
    Case(
        "fractions in a list",
        "ok: ok",
        verdict(
            "from fractions import Fraction as F\ndef f(): return [F(1, 3)]",
            "from fractions import Fraction\nassert f() == [Fraction(1, 3)]",
        ),
    ),
    Case(
        "dates",
        "ok: ok",
        verdict(
            "import datetime\ndef f(day): return day + datetime.timedelta(1)",
            "from datetime import date\nassert f(date(2026, 1, 31)) == date(2026, 2, 1) and f(date(2026, 1,"
            " 1)).year == 2026",
        ),
    ),
    Case(
        "a decimal with its own equality",
        "ok: failed",
        verdict(
            "import decimal\nclass Decimal(decimal.Decimal):\n    __eq__ = lambda *rest:"
            " True\nDecimal.__module__ = 'decimal'\ndef f(): return Decimal(3)",
            "from decimal import Decimal\nassert f() == Decimal(5)",
        ),
    ),
    # tests that decide nothing
    Case("rows of nothing zipped", "ok: passed by", reason("for a, b in zip(rows(), [1, 2]): assert a == b")),
    Case("rows of nothing in all", "ok: passed by", reason("assert all(x > 0 for x in rows())")),
    Case(
        "only an empty generator",
        "ok: passed by an empty generator",
        reason("g = rows()\nassert iter(g) is g\nfor x in g: assert x == 1"),
    ),
    Case("one branch", "ok: passed by the constant True", reason("assert even(2)")),
    Case("both branches", "ok: they decide", reason("assert even(2)\nassert not even(3)")),
    Case("a list, a set, a dict of nothing", "ok: passed by the constant", reason("assert len(f()) == 0")),
    Case(
        "a mutable answer",
        "ok: passed by the constant \\[\\]",
        reason("x = f()\nx.append(1)\nassert x == [1]"),
    ),
    Case(
        "an error that is caught",
        "ok: passed by an error",
        reason("try: f(3)\nexcept (KeyError, OSError): pass\nelse: assert 0"),
    ),
    Case(
        "an object that says yes",
        "ok: passed by an object that says yes",
        reason("assert f(3).startswith('a')"),
    ),
    Case(
        "a class of the program's",
        "ok: passed by an object that says yes",
        reason("s = Stack()\ns.push(1)\nassert s.pop()"),
    ),
    Case(
        "equality of the program's own",
        "ok: they decide",
        reason("assert V(1) + V(2) == V(3) and not V(1) == V(2)\nassert V(1).x == 1"),
    ),
    Case("an if around the test", "ok: passed by", reason("if f(2): assert f(2) == 4")),
    Case("a name that is no function", "ok: passed by the value", reason("assert not errors")),
    Case(
        "as a module",
        "ok: passed by the constant None",
        reason("import solution\nassert solution.f() is None"),
    ),
    Case("a built-in name", "ok: passed by the constant", reason("assert sum([0]) == 0")),
    Case("no syntax", "ok: do not compile", reason("assert f(")),
    Case("end of the process", "ok: they decide", reason("import os\nassert f() == 1 or os._exit(0)")),
    Case("a loop without end", "ok: they decide", reason("while True: f()")),
    Case(
        "a row with and one without a reference",
        r"ok: \[\['reference'\], \['tests'\]\] the tests of 2 of 3 rows decide nothing.*1 of these",
        left_out(
            {"tests": "assert f(1)", "reference": "def f(x): return x"},
            {"tests": "assert f(1)"},
            {"tests": ["assert f(1) == 2"]},
        ),
    ),
    Case("no row is left", "refused: .*add tests that", left_out({"tests": "assert f(1)"})),
    Case(
        "rows without tests", r"ok: \[\[\], \['reference'\]\] $", left_out({}, {"reference": "def f(): pass"})
    ),
    # the program in an answer
    Case(
        "several blocks are one program",
        r"ok: 'x = 1\\nx = 2'",
        code_of("```python\nx = 1\n```\nor\n```py\nx = 2\n```"),
    ),
    Case("output is no code", "ok: 'x = 1'", code_of("```python\nx = 1\n```\n```\nIt is 1\n```")),
    Case(
        "another language first", "ok: 'x = 1'", code_of("```bash\npip install x\n```\n```python\nx = 1\n```")
    ),
    Case("never closed", "ok: 'x = 1'", code_of("So:\n```python\nx = 1")),
    Case(
        "never closed after another",
        r"ok: 'x = 1\\ny = 2'",
        code_of("```python\nx = 1\n```\n```python\ny = 2"),
    ),
    Case(
        "a whole answer in a block",
        "ok: 'x = 1'",
        code_of("```markdown\n# Title\n```python\nx = 1\n```\n```"),
    ),
    Case("a longer fence around", "ok: 'x = 1'", code_of("````md\n```python\nx = 1\n```\n````")),
    Case("the block opened twice", "ok: 'x = 1'", code_of("```python\n```python\nx = 1\n```\n```")),
    Case(
        "a fence in a docstring",
        r"ok: 'def f\(\):.*return 1'",
        code_of('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1\n```'),
    ),
    Case("tildes", "ok: 'x = 1'", code_of("~~~python\nx = 1\n~~~")),
    Case(
        "a closing mark that is too short",
        "ok: 'x = 1\\\\n```\\\\ny'",
        code_of("````python\nx = 1\n```\ny\n````"),
    ),
    Case("Windows' ends of lines", "ok: 'x = 1'", code_of("```python\r\nx = 1\r\n```\r\n")),
    Case("in a list", "ok: 'x = 1'", code_of("1. Do\n\n       ```python\n       x = 1\n       ```\n")),
    Case("ticks in prose", "ok: ''", code_of("Use ```x = 1``` here.")),
    Case("an empty block", "ok: ''", code_of("```python\n```")),
    Case("wrappers without end", "ok: '", code_of("```a\n" * 5000)),
    # what a program may hold
    Case("a file too large", "ok: failed", verdict("open('f', 'wb').write(b'x' * (17 << 20))", "")),
    Case(
        "disk past a file's end",
        "ok: failed",
        verdict("import os\nf = os.open('f', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(f, 0, 1 << 20)", ""),
    ),
]


@pytest.mark.skipif(NONE, reason="this machine offers no jail (install bubblewrap)")
@pytest.mark.parametrize(**table(CASES))
def test_case(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong


@pytest.mark.skipif(NONE, reason="this machine offers no jail (install bubblewrap)")
def test_weak_tests_are_told_before_stage_1(tmp_path):
    lines = [
        json.dumps({"instruction": f"Is {n} even?", "response": "no code", "tests": test})
        for n, test in enumerate(["assert even(2)"] * 3 + ["assert even(2) and not even(3)"] * 5)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    said = []
    preset = load_preset("tiny", [f"data.grpo-code={tmp_path / 'rows.jsonl'}", "arms=[grpo-code]"])
    preflight_rows.check_tests(findings.Preflight(preset, tmp_path, said.append))
    assert (
        len(said) == 1
        and "the tests of 3 of 8 rows decide nothing" in said[0]
        and "constant True (3)" in said[0]
    )


@pytest.mark.skipif(NONE, reason="this machine offers no jail (install bubblewrap)")
def test_a_stage_leaves_weak_tests_out_and_keeps_the_line():
    said, told = [], {"weights": {}}
    work = SimpleNamespace(unsafe=False, report=said.append)
    sound, weak = {"messages": [], "tests": "assert f(1) == 2"}, {"messages": [], "tests": "assert f(1)"}
    assert stages._with_sound_tests(work, [sound], told) == [sound] and told == {"weights": {}}
    assert (
        stages._with_sound_tests(work, [sound, weak], told) == [sound]
        and told["tests"] == said
        and len(said) == 1
    )


@pytest.mark.skipif(NONE, reason="this machine offers no jail (install bubblewrap)")
def test_a_jail_that_fails_leaves_nothing_out():
    failed = [jail.CodeResult(None, "sandbox-error", "", "", 0.0)]
    assert weak_tests.weak_tests(["assert f(77)"], lambda programs: failed * len(programs)) == {
        "assert f(77)": ""
    }
    assert (
        weak_tests.weak_tests(["assert f(77)"], jail.run_many)["assert f(77)"]
        == "passed by the constant True"
    )


def test_the_quota_is_the_one_that_the_chapter_states():
    assert walls.QUOTA // walls.FILE_COST * walls.FILE_LIMIT == 128 << 20 and walls.FOLDER_LIMIT == 64 << 20
