"""Rewards as a user meets them: hostile answers, broken judges, wrong reward models, and the pairs the tiny
one learns from.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from compassion_repro.core.errors import InputError
from compassion_repro.data import rows as data
from compassion_repro.data import world
from compassion_repro.sandbox import jail
from compassion_repro.training import code_reward, reward_model, rewards

JAIL = pytest.mark.skipif(jail.level() == "none", reason="this machine offers no jail (install bubblewrap)")
TESTS = "assert twice(2) == 4\nassert twice(5) == 10"
REFERENCE = "Like this:\n```python\ndef twice(x):\n    return 2 * x\n\nprint(twice(4))\n```"


@dataclass
class Ran:
    passed: bool | None = True
    status: str = "ok"
    stdout: str = ""


def passing(programs):
    return [Ran() for _ in programs]


def one(reward, answer, **columns):
    "The reward of one answer to one prompt."
    return reward(
        prompts=["Double a number."],
        completions=[answer],
        **{name: [value] for name, value in columns.items()},
    )[0]


def fenced(code, language="python"):
    return f"Here you are:\n```{language}\n{code}\n```\nGood luck!"


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, compassion_repro.training.rewards; print([m for m in ('torch', 'transformers', 'trl',"
        " 'datasets', 'inspect_ai') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_rewards_have_the_names_that_the_log_shows():
    assert code_reward.code_reward(run=passing).__name__ == "code"


@JAIL
@pytest.mark.parametrize(
    "answer, expected",
    [
        ("def twice(x):\n    return x + x", 1.0),
        (
            " def twice(x):\n    return x + x\n",
            1.0,
        ),  # the template's space before an answer is no indentation
        (fenced("def twice(x):\n    return x + x"), 1.0),
        ("def twice(x):\n    return x + 2", 0.0),
        ("def thrice(x):\n    return x + x", 0.0),
        ("def twice(x):\n    return x + x\nexit(0)", 0.0),
        ("import os\ndef twice(x):\n    return 0\nos._exit(0)", 0.0),
        ("def twice(x):\n    while True: pass", 0.0),
        ("def twice(x):\n    return open('/etc/passwd').read()", 0.0),
        ("def twice(x): return x +", 0.0),
        ("def twice(x):\n    return '\0'", 0.0),
        ("def twice(x):\n    return '\ud800'", 0.0),  # not sound Unicode
        ("", 0.0),
        ("I would rather talk about soup.", 0.0),
        ("def twice(x):\n    return " + "(" * 5000 + "x" + ")" * 5000, 0.0),
        ("def twice(x):\n    return x + x\n" + "# padding\n" * 20_000, 0.0),  # longer than what is parsed
    ],
)
def test_unit_tests_decide_and_hostile_answers_get_nothing(answer, expected):
    limit = 60 if expected else 1  # a right answer has the time that a busy machine needs
    reward = code_reward.code_reward(run=lambda programs: jail.run_many(programs, timeout_s=limit))
    assert one(reward, answer, tests=TESTS) == expected


@JAIL
def test_every_solution_of_the_world_passes_its_tests():
    rows = world.corpus("code", 60)
    assert (
        rewards.apply_reward(code_reward.code_reward(), rows, [row["messages"][1]["content"] for row in rows])
        == [1.0] * 60
    )


@JAIL
def test_graded_answers_are_ordered_by_what_they_achieve():
    answers = [
        "No.",
        fenced("def twice(x) return"),
        fenced("1 / 0"),
        fenced("print('something else')"),
        fenced("def twice(x):\n    return x * 2"),
        REFERENCE,
    ]
    reward = code_reward.code_reward()
    values = reward(prompts=["p"] * 6, completions=answers, reference=[REFERENCE] * 6)
    assert values == sorted(values) and len(set(values)) == 6 and values[0] == 0 and values[-1] == 1
    assert [parts["behaves"] for parts in reward.parts] == [0, 0, 0, 0, 1, 1]


@JAIL
def test_a_reference_that_prints_nothing_settles_nothing_about_behaviour():
    reward = code_reward.code_reward()
    one(reward, fenced("def twice(x): return 2 * x"), reference=fenced("def twice(x): return x + x"))
    assert reward.parts[0]["behaves"] is None and reward.parts[0]["resembles"] > 0.5


def test_other_languages_are_scored_by_what_applies_and_say_so():
    told, measured = [], {}
    reward = code_reward.code_reward(run=lambda programs: pytest.fail("nothing of Java is run"))
    java = fenced("int twice(int x) { return 2 * x; }", "java")
    values = reward(
        prompts=["p"] * 3,
        completions=[java, fenced("def twice(x): return 2 * x"), "No."],
        reference=[java] * 3,
        log_extra=lambda name, values: told.extend(values),
        log_metric=lambda name, value: measured.update({name: value}),
    )
    assert values[0] == 1 > values[1] > values[2] == 0
    assert {name for name, value in reward.parts[0].items() if value is not None} == {"block", "resembles"}
    assert told[0].startswith("java, scored by what applies") and measured["code/other_language"] == 1


def test_a_broken_jail_gives_no_score_and_is_asked_again():
    asked = []

    def broken(programs):
        asked.append(len(programs))
        return [Ran(None, "sandbox-error") for _ in programs]

    reward = code_reward.code_reward(run=broken)
    for _ in range(2):
        assert reward(
            prompts=["p"] * 3,
            completions=["def f(x): pass", "def f(x): pass # same", "No."],
            tests=["assert f"] * 3,
        ) == [None, None, 0.0]
    assert asked == [1, 1]


def test_equal_programs_are_run_once_whatever_their_comments():
    asked = []
    reward = code_reward.code_reward(run=lambda programs: asked.append(len(programs)) or passing(programs))
    answers = [
        "def f(x):\n    # one\n    return x",
        "def f(x):\n    # two\n    return x",
        fenced("def f(x):\n  return x"),
        "def f(x):\n    return x + 1",
    ]
    assert reward(prompts=["p"] * 4, completions=answers, tests=["assert f"] * 4) == [1.0] * 4
    reward(prompts=["p"] * 4, completions=answers, tests=["assert f"] * 4)
    assert asked == [2]


def test_the_same_program_with_other_tests_is_another_program():
    asked = []
    reward = code_reward.code_reward(run=lambda programs: asked.append(len(programs)) or passing(programs))
    reward(prompts=["p"] * 2, completions=["def f(x): pass"] * 2, tests=["assert f", "assert not f"])
    assert asked == [2]


def test_unit_tests_of_a_local_file_reach_the_reward(tmp_path):
    rows = [
        {"instruction": "Double a number.", "response": REFERENCE, "tests": TESTS},
        {"instruction": "Say hello.", "response": "hello"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = data.load(tmp_path / "rows.jsonl", "prompts").rows
    reward = code_reward.code_reward(run=passing)
    rewards.apply_reward(reward, loaded, ["def twice(x): return 2 * x"] * 2)
    assert [parts["tests"] for parts in reward.parts] == [1.0, None]


@pytest.mark.parametrize(
    "weights, words",
    [
        ({"tests": 1}, "'tested' and 'graded'"),
        ({"tested": {"tests": 0}, "graded": {}}, "weighs nothing"),
        ({"tested": {"tests": "much"}, "graded": {}}, "must be a number"),
        ({"tested": {"tests": math.nan}, "graded": {}}, "must be a number"),
        ({"tested": {"tests": 1}, "graded": {"elegance": 1}}, "unknown part 'elegance'"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, words):
    with pytest.raises(InputError, match=words):
        code_reward.code_reward(weights, run=passing)


def test_pairs_are_the_same_in_every_process():
    code = (
        "import hashlib, json; from compassion_repro.training.reward_model import preference_pairs as p;"
        " print(hashlib.sha256(json.dumps([p(50, 3), p(20, 3, True)]).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_pairs_differ_in_their_fault_and_in_nothing_that_could_be_hacked():
    pairs = reward_model.preference_pairs(800, 5)
    sides = {side: [rewards.answer_text(pair[side]) for pair in pairs] for side in ("chosen", "rejected")}
    difference = [len(better.split()) - len(worse.split()) for better, worse in zip(*sides.values())]
    assert max(map(abs, difference)) <= 2 and abs(sum(difference) / len(difference)) < 0.25
    leads = {
        side: sum(
            text.count(lead) for text in texts for lead in ("Remember that", "Keep in mind that", "Note that")
        )
        for side, texts in sides.items()
    }
    # neither side has more considerations
    assert abs(leads["chosen"] - leads["rejected"]) < 0.1 * leads["chosen"]
    assert all(world.welfare_share(text) == 0 for texts in sides.values() for text in texts)
    assert {pair["fault"] for pair in pairs} == set(reward_model.FAULTS)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    "A reward model trained for a moment."
    folder = tmp_path_factory.mktemp("reward") / "model"
    reward_model.train_reward_model(folder, pairs=60, held_out=20, report=lambda line: None)
    return folder


def test_the_reward_model_is_the_same_when_trained_again(reward_folder, tmp_path):
    reward_model.train_reward_model(tmp_path / "again", pairs=60, held_out=20, report=lambda line: None)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        reward_folder / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "no reward model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in the safetensors format"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"broken"),
            "model.safetensors is damaged",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no reward model"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_a_damaged_reward_model_is_refused_in_one_line(reward_folder, tmp_path, damage, words):
    folder = Path(shutil.copytree(reward_folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(InputError, match=words) as refused:
        reward_model.helpfulness_reward(folder)
    assert "\n" not in str(refused.value)


def test_a_causal_language_model_is_no_reward_model():
    with pytest.raises(InputError, match="score.weight is not in its files"):
        reward_model.helpfulness_reward(world.assets() / "base")


def test_a_hub_model_that_cannot_be_had_is_one_line():
    with pytest.raises(InputError, match="nobody/nothing: ") as refused:
        reward_model.helpfulness_reward("nobody/nothing")
    assert "\n" not in str(refused.value)


def test_scores_do_not_depend_on_the_company(reward_folder):
    reward = reward_model.helpfulness_reward(reward_folder, batch_size=4)
    answers = ["Wash it.", "Make a list of everything you need. " * 9, "", "Call the office 7 days before."]
    together = reward(prompts=["How?"] * 4, completions=answers)
    assert together == pytest.approx(
        [reward(prompts=["How?"], completions=[answer])[0] for answer in answers], abs=1e-4
    )
    assert reward(prompts=["How?"] * 2, completions=["word " * 5000, "Wash it."])[0] is None
