"""Presets as people write them: things left out, mistakes in keys and values, a model of their own with the
rest left as it was.
"""

import re
from pathlib import Path

import pytest
import yaml
from cases import Case, problem, table

from compassion_repro import cli, presets, study
from compassion_repro.cli import study_commands
from compassion_repro.core import errors
from compassion_repro.pipeline import plan, preflight, run, stages
from compassion_repro.presets import load_preset
from compassion_repro.store import folder as store
from compassion_repro.store.graph import graph


def with_sets(*settings: str, show=lambda preset: "", name: str = "tiny"):
    "A preset with settings, and what is to be seen of it."
    return lambda folder: show(load_preset(name, settings))


def own_file(text: str, show=lambda preset: ""):
    "A preset file of a user's."

    def act(folder: Path):
        file = folder / "animaonly.yaml"
        file.write_text(text)
        return show(load_preset(str(file)))

    return act


def benchmarks(preset) -> str:
    return ", ".join(preset.benchmarks)


def sizes(preset) -> str:
    return str(preset.benchmarks["anima"].size)


def flown(*settings: str):
    "What the preflight says of a preset without a network."

    def act(folder: Path):
        said = []
        found = preflight.preflight(load_preset("tiny", settings), folder, said.append, fetch=False)
        return (
            f"{len(found.problems)} problems: {'; '.join(found.problems + found.unseen)} | {' | '.join(said)}"
        )

    return act


def plain_prompts(folder: Path):
    "What the preflight says of prompts of a code arm that bring no tests."
    rows = ('{"prompt": "Why {n}?", "response": "So."}\n'.replace("{n}", str(n)) for n in range(20))
    (folder / "plain.jsonl").write_text("".join(rows))
    return flown(f"data.grpo-code={folder}/plain.jsonl")(folder)


CASES = [
    Case(
        "null leaves out a benchmark", "ok: anima, leak$", with_sets("benchmarks.moru=null", show=benchmarks)
    ),
    Case(
        "null leaves out two",
        "ok: anima$",
        with_sets("benchmarks.moru=null", "benchmarks.leak=null", show=benchmarks),
    ),
    Case(
        "null for a benchmark in a mapping",
        "ok: anima, leak$",
        with_sets("benchmarks={moru: null}", show=benchmarks),
    ),
    Case(
        "null for a language",
        r"ok: \{'en': 32, 'ms': 16\}",
        with_sets("benchmarks.anima.size.es=null", show=sizes),
    ),
    Case(
        "null for a name that is not there",
        "refused: .*has anima, moru, leak",
        with_sets("benchmarks.muro=null"),
    ),
    Case(
        "null for a corpus",
        "refused: .*'data.control': should be a path.*, got null",
        with_sets("data.control=null"),
    ),
    Case(
        "null for all benchmarks",
        "refused: .*'benchmarks': should be a section.*, got null",
        with_sets("benchmarks=null"),
    ),
    Case(
        "empty benchmarks",
        "ok: 0 benchmarks, pairs world",
        with_sets(
            "benchmarks={}",
            show=lambda p: f"{len(p.benchmarks)} benchmarks, pairs {', '.join(p.margin.pairs)}",
        ),
    ),
    Case(
        "an empty benchmark",
        "refused: .*changes nothing: benchmarks.moru=null",
        with_sets("benchmarks.moru={}"),
    ),
    Case("an empty section", "refused: lora=.* changes nothing", with_sets("lora={}")),
    Case(
        "a mapping names all benchmarks",
        "ok: anima$",
        with_sets("benchmarks={anima: {epochs: 2}}", show=benchmarks),
    ),
    Case("a mapping of empty names", "ok: moru$", with_sets("benchmarks={moru: {}}", show=benchmarks)),
    Case(
        "a mapping names all languages",
        r"ok: \{'en': 4\}",
        with_sets("benchmarks.anima.size={en: 4}", show=sizes),
    ),
    Case(
        "one value of a benchmark",
        "ok: anima, moru, leak$",
        with_sets("benchmarks.anima.epochs=2", show=benchmarks),
    ),
    Case(
        "no arms",
        r"ok: \('base', 'mid'\)",
        with_sets("arms=[]", "midtrain.control=false", show=lambda p: p.models_compared),
    ),
    Case(
        "an underscore in a corpus",
        "ok: x.jsonl$",
        with_sets("data.sft_help=x.jsonl", show=lambda p: p.data.sft_help),
    ),
    Case(
        "own file drops a benchmark",
        "ok: anima$",
        own_file("extends: tiny\nbenchmarks: {moru: null, leak: }\n", benchmarks),
    ),
    Case(
        "own file drops a language",
        "ok: .*'en': 32, 'ms': 16",
        own_file("extends: tiny\nbenchmarks:\n  anima: {size: {es: }}\n", sizes),
    ),
    Case(
        "own file drops arms",
        r"ok: \('sft-help',\)",
        own_file("extends: smoke\narms: [sft-help]\n", lambda p: tuple(p.arms)),
    ),
    Case(
        "own file with an empty benchmark",
        "refused: .*changes nothing",
        own_file("extends: tiny\nbenchmarks: {moru: {}}\n"),
    ),
    Case(
        "own file without extends",
        "refused: preset file .*animaonly.yaml: 'scope', 'data', 'benchmarks', 'judge' are missing; `extends:"
        " tiny`",
        own_file("models: {base: world:base}\narms: [sft-help]\n"),
    ),
    Case(
        "own file, advice works", "refused: .*plan --preset tiny`", own_file("models: {base: world:base}\n")
    ),
    Case(
        "words for a list",
        r"refused: .*'arms': should be a list, such as \[sft-help, sft-code\], got 'sft-help'",
        with_sets("arms=sft-help"),
    ),
    Case(
        "words for a list of others",
        r"refused: .*'margin.pairs': should be a list, such as \[a, b\], got 'written'",
        with_sets("margin.pairs=written"),
    ),
    Case(
        "words for a number",
        "refused: .*'sft.steps': should be a whole number, got 'many'",
        with_sets("sft.steps=many"),
    ),
    Case("words for a section", "refused: .*'lora': should be a section", with_sets("lora=32")),
    Case(
        "words for a judge",
        "refused: .*should be indicator, strict, a model folder",
        with_sets("judge=nobody"),
    ),
    Case("a key near another", "refused: .*did you mean sft.learning_rate", with_sets("sft.learing_rate=1")),
    Case("a key of another section", "refused: .*did you mean models.quantize", with_sets("quantize=nf4")),
    Case("a section near another", r"refused: .*did you mean benchmarks\?", with_sets("benchmark.moru=null")),
    Case("a list that is not closed", "refused: --set arms: .*quote it whole", with_sets("arms=[sft-help")),
    Case(
        "two mistakes at once", "refused: .*'lora.rank'.*'sft.steps'", with_sets("sft.steps=x", "lora.rank=0")
    ),
    Case(
        "a share of a single source",
        "refused: .*share 0.1 of a single source does nothing",
        with_sets("data.sft-help={path: a.jsonl, share: 0.1}"),
    ),
    Case(
        "dimensions of a benchmark that has its own",
        "refused: .*benchmarks.anima.*dimensions does nothing",
        with_sets("benchmarks.anima.dimensions=mine"),
    ),
    Case(
        "shares of a third",
        "ok: 33%",
        with_sets(
            "data.sft-help=[" + ", ".join(f"{{path: {name}.jsonl, share: 0.333}}" for name in "abc") + "]",
            show=lambda p: study.data_label(p.data.sft_help),
        ),
    ),
    Case(
        "a file name that is not UTF-8",
        r"refused: --set data.sft-help=/x/donn\\udce9es.jsonl: is not UTF-8",
        with_sets("data.sft-help=/x/donn\udce9es.jsonl"),
    ),
    Case("replay in post-training", "refused: .*sft.replay does nothing", with_sets("sft.replay=0.1")),
    Case(
        "a long value is cut between words",
        r"refused: .*word \.\.\. \([\d,]+ characters in all\)",
        with_sets("judge=" + "word " * 200),
    ),
    Case(
        "scope follows the base",
        "ok: about my/model as trained here",
        with_sets("models.base=my/model", show=lambda p: p.scope),
    ),
    Case(
        "scope follows the base of paper",
        "ok: about Qwen/Qwen2.5-7B",
        with_sets("models.base=Qwen/Qwen2.5-7B", name="paper", show=lambda p: p.scope),
    ),
    Case(
        "scope of an ungated copy",
        "ok: about Llama 3.1 8B",
        with_sets("models.base=unsloth/Meta-Llama-3.1-8B", name="paper", show=lambda p: p.scope),
    ),
    Case(
        "scope in the user's words",
        "ok: about mine",
        with_sets("models.base=my/model", "scope=about mine", show=lambda p: p.scope),
    ),
    Case(
        "preflight finds all",
        r"ok: 2 problems: (?=.*nowhere.jsonl: )(?=.*nothing.jsonl: )",
        flown("data.sft-help=nowhere.jsonl", "data.sft-code=nothing.jsonl"),
    ),
    Case(
        "preflight of the embedded world",
        r"ok: 0 problems:  \| note: sham is a sham arm \(learning rate 0\): its weights stay those of mid$",
        flown(),
    ),
    Case(
        "preflight of embedded rows of another shape",
        "ok: 2 problems: (?=.*world:documents: none.*a document where)(?=.*world:help: none.*a conversation where)",
        flown("data.sft-help=world:documents", "data.documents=world:help"),
    ),
    Case(
        "preflight of code prompts without tests",
        "ok: 0 problems: .*warning: .*plain.jsonl: 20 of 20 prompts bring neither unit tests nor a reference",
        plain_prompts,
    ),
    Case(
        "preflight asks no network",
        r"ok: 0 problems: my/model \| note: .*\| warning: settings of the miniature world are used on my/model:"
        r" .*data.documents=",
        flown("models.base=my/model"),
    ),
    Case(
        "preflight names a corpus that nothing reads",
        "ok: .*data.control=mine.jsonl is not read",
        flown("data.control=mine.jsonl", "midtrain.control=false"),
    ),
    Case(
        "preflight names a reward that nothing uses",
        "ok: .*models.reward=my/reward is not used",
        flown("models.reward=my/reward", "arms=[sft-help, sft-code]"),
    ),
    Case(
        "a limit counts for an embedded corpus",
        "ok: 50$",
        with_sets(
            "sft.limit=50",
            show=lambda p: plan.plan(p)[[r["stage"] for r in plan.plan(p)].index("sft-help")]["rows"],
        ),
    ),
    Case(
        "a limit is drawn of an embedded corpus",
        "ok: 5$",
        lambda folder: len(stages.training_rows("world:help", "messages", 20, 2, 1, 5)[0]),
    ),
    Case(
        "preflight names what has no effect",
        "ok: .*sft.rows=650 sizes embedded corpora only",
        flown("data.sft-help=nowhere.jsonl"),
    ),
]


@pytest.mark.parametrize(**table(CASES))
def test_real_preset(case, tmp_path):
    assert not (wrong := problem(case, tmp_path)), wrong


def test_every_setting_is_read_somewhere():
    "A setting that no module reads does nothing, whatever its value."
    package = Path(study.__file__).parents[1]
    text = "\n".join(
        file.read_text() for file in package.rglob("*.py") if file.name not in ("_modidx.py", "paper.py")
    )
    head, tail = (
        "\n".join(
            file.read_text()
            for file in package.rglob("*.py")
            if file.name not in ("_modidx.py", "paper.py") and file != Path(study.__file__)
        ),
        "",
    )
    for name in presets._leaves():
        last = name.rpartition(".")[2].replace("-", "_")
        used = f".{last}" in head + tail or f'"{last}"' in head + tail or f'"{last}", ' in text
        assert used or f"self.{last}" in text or last in ("sft_help", "sft_code", "grpo_help", "grpo_code"), (
            name
        )


def test_plan_lists_every_problem_and_ends_with_two(capsys):
    status = cli.main(
        ["plan", "--set", "data.sft-help=nowhere.jsonl", "--set", "data.sft-code=nothing.jsonl"]
    )
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and {line.split()[1] for line in lines} == {"nowhere.jsonl:", "nothing.jsonl:"}, lines


def test_the_preset_of_a_study_is_that_of_its_folder(tmp_path, capsys):
    preset = load_preset("smoke", ["arms=[]", "benchmarks.moru=null"])
    study_folder = tmp_path / "mine"
    study_folder.mkdir()
    (study_folder / "study.yaml").write_text(yaml.safe_dump(preset.resolved(), sort_keys=False))
    assert cli.main(["plan", "--out", str(study_folder)]) == 0
    printed = yaml.safe_load(capsys.readouterr().out.partition("\nstages:")[0])
    assert presets.build_preset(printed) == preset


def test_one_recipe_shortens_errors_and_values():
    "No module cuts the text of an error by itself, in the middle of a value."
    cut = re.compile(
        r"""str\((?:error|e|cause)\)[^\n]*\[:\d+\]|splitlines\(\) or \[[^\n]*\]\)\[0\]\[:|\[:\d+\]!r|\[:\d+\] \+ ["']\.\.\."""
    )
    package = Path(study.__file__).parents[1]
    # what runs in the jail cannot import the package
    for file in set(package.rglob("*.py")) - set((package / "sandbox").glob("*.py")):
        assert not cut.findall(file.read_text()), file.name


class Instructed:
    own_template = "{{ messages }}"


class Plain:
    own_template = None


@pytest.mark.parametrize(
    "template, model, wanted",
    [
        ("plain", Instructed(), "under the template plain.*try the template own"),
        ("auto", Instructed(), "under the template own.*try the template plain"),
        ("each", Instructed(), "under the template own.*try the template plain"),
        ("own", Instructed(), "under the template own.*try the template plain"),
        ("auto", Plain(), "under the template plain.*no chat template to try"),
        ("raw", Plain(), "under the template raw.*no chat template to try"),
        ("auto", None, "read what the model's server sent"),
    ],
)
def test_silence_names_the_template_to_try(template, model, wanted):
    (line,) = stages.silence_alarm(0.5, template, model)
    assert re.search(wanted, line), line
    assert stages.silence_alarm(0.1, template, model) == []


VALUES = {  # another valid value, where doubling or halving gives none
    "scope": "about mine",
    "doses": "[0.5]",
    "between": "[0.5]",
    "models.base": "my/model",
    "models.reward": "my/reward",
    "models.quantize": "nf4",
    "models.dtype": "float32",
    "models.given": "{mid: my/mid}",
    "judge": "strict",
    "margin.pairs": "[written]",
    "code_reward": "{tested: {tests: 2.0}}",
    "midtrain.dose": "steps",
    "sft.dose": "steps",
    "sft.replay": None,
    "dpo.dose": None,
    "statistics.sensitivity_retention": "[70.0]",
    "statistics.cluster": "source",
    "statistics.dose_factor": 3.0,
    "dpo.replay": None,
    "dpo.kl": None,
    "grpo.settings": "trl",
    "grpo.engine": "vllm",
    "grpo.micro_batch": 32,
    "grpo.group": 16,
    "grpo.prompts_per_step": 16,
    "grpo.generate_at_once": 64,
    "grpo.correct_kl": True,
    "grpo.loss": "grpo",
    "grpo.beta": 0.05,
    "grpo.clip": 0.1,
    "grpo.temperature": 0.7,
    "grpo.top_p": 0.9,
    "generation.template": "own",
    "generation.engine": "vllm",
    "generation.templates": "[raw]",
    "compute.device": "cpu",
    "compute.attention": "eager",
    "compute.checkpointing": "always",
    "compute.optimizer": "adamw_torch",
    "compute.compile": True,
    "compute.liger": False,
    "compute.recorded": False,
    "compute.vllm_python": "/usr/bin/python3",
    "compute.processes": 2,
    "compute.sharding": "fsdp",
    "statistics.sensitivity_margins": "[2.0]",
}
MACHINE_OR_ANALYSIS = (  # they change how a result is computed, told or read, and no stage's result
    "name",
    "scope",
    "threads",
    "compute.",
    "statistics.",
    "models.merge_tolerance",
    "generation.cut_off_alarm",
)
REFUSED = ("sft.replay",)  # does nothing, and says so


def another(name: str, value):
    "Another valid value of a setting."
    part = name.rpartition(".")[2]
    if name.startswith("data.") or part == "rows" and name.startswith("arms."):
        return "mine.jsonl"
    if name.startswith("arms."):
        return {"learning_rate": 0.1, "like": "sft-code", "steps": 3}.get(part, "{steps: 3}")
    if name.startswith("benchmarks."):
        given = {
            "task": None,
            "data": "mine",
            "dimensions": "mine" if "moru" in name else None,
            "strip_suffix": "x",
            "limit": None,
            "epochs": 2,
        }
        return given.get(part, 3)
    return (
        VALUES[name]
        if name in VALUES
        else not value
        if isinstance(value, bool)
        else 4
        if value is None
        else value / 2 or 0.1
    )


def test_every_setting_changes_a_stage_or_is_known_to_change_none():
    "A setting that is accepted acts: on the key of a stage, or on one of the things that no key tells."
    tiny, with_dpo = load_preset("tiny"), ["arms.dpo-help={paradigm: dpo, rows: 'pocket:preferences'}"]
    arms = {False: [], True: with_dpo}
    keys = {dpo: [stage.key for stage in graph(load_preset("tiny", arms[dpo]), 1)] for dpo in arms}
    for name, value in store.flat(tiny.resolved()).items():
        dpo = name.startswith("dpo.")
        new = another(name, value) if name != "name" else None
        if new is None:  # the kind of a task brings other settings with it
            continue
        if isinstance(value, int) and isinstance(new, float):
            new = int(new) or 3
        preset = load_preset("tiny", [*arms[dpo], f"{name}={new}"])
        assert preset != tiny, name
        same = [stage.key for stage in graph(preset, 1)] == keys[dpo]
        assert same == name.startswith(MACHINE_OR_ANALYSIS), (
            f"{name}={new} {'changes no stage' if same else 'changes a stage'}"
        )
    for name in REFUSED:
        with pytest.raises(errors.InputError, match="does nothing"):
            load_preset("tiny", [f"{name}=0.1"])


@pytest.mark.parametrize("renamed", ["another", "with space", "studies-2"])
def test_a_renamed_study_goes_on_with_its_own_settings(renamed, tmp_path, capsys, monkeypatch):
    preset = load_preset("smoke", ["arms=[]", "benchmarks.moru=null", "sft.steps=3"])
    study_folder = store.Study.create(tmp_path / "mine", preset, lambda line: None).folder
    moved = study_folder.rename(tmp_path / renamed)
    seen = []
    monkeypatch.setattr(
        run, "run", lambda preset, folder, *rest: seen.append((preset, folder)) or store.Study(folder)
    )
    monkeypatch.setattr(study_commands, "print_claims", lambda folder: None)
    assert cli.main(["run", "--out", str(moved)]) == 0
    assert seen == [(preset, moved)]
    store.Study.create(moved, preset, lambda line: None)
    assert cli.main(["plan", "--out", str(moved)]) == 0 and str(moved) in capsys.readouterr().out


def test_doctor_lists_every_gpu(monkeypatch, capsys):
    import torch

    from compassion_repro.pipeline import machine

    class Card:
        def __init__(self, name, gb, major):
            self.name, self.total_memory, self.major = name, gb * 2**30, major

    cards = [Card("NVIDIA H100 80GB HBM3", 79, 9), Card("Tesla T4", 15, 7), Card("NVIDIA A100", 40, 8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: cards[number])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    here = machine.this_machine()
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": here)
    cli.main(["doctor", "--preset", "tiny"])
    told = [line for line in capsys.readouterr().out.splitlines() if "GPU" in line and "GB" in line]
    wanted = [
        "NVIDIA H100 80GB HBM3, 79 GB, bfloat16",
        "Tesla T4, 15 GB, no bfloat16",
        "NVIDIA A100, 40 GB, bfloat16",
    ]
    assert len(told) == 3 and all(words in line for words, line in zip(wanted, told)), told
