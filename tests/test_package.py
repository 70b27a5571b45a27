"""The package itself: what a wheel holds, what a room imports, that the repository is in sync."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT

HEAVY_LIBRARIES = ["torch", "transformers", "trl", "datasets", "inspect_ai"]
HEAVY = {
    "bench.cpu",
    "bench.answers",
    "bench.clocks",
    "bench.gpu",
    "bench.grpo_steps",
    "bench.model",
    "bench.training_runs",
    "data.lengths",
    "data.rows",
    "data.schemas",
    "data.sources",
    "data.turns",
    "evaluation.benchmark_data",
    "evaluation.benchmarks",
    "evaluation.checkpoint",
    "evaluation.generate",
    "evaluation.grades",
    "evaluation.indicators",
    "evaluation.inspect_runner",
    "evaluation.inspect_tasks",
    "evaluation.judge_free",
    "evaluation.judges",
    "evaluation.outcome_judge",
    "evaluation.replies",
    "evaluation.scoring",
    "evaluation.values",
    "training.adapters",
    "training.advantages",
    "training.checkpoints",
    "training.dequantise",
    "training.device",
    "training.dpo",
    "training.encoding",
    "training.fitting",
    "training.grpo",
    "training.held_out",
    "training.merging",
    "training.midtrain",
    "training.model_checks",
    "training.models",
    "training.near_start",
    "training.packed_rows",
    "training.points",
    "training.processes",
    "training.recorded_steps",
    "training.recording",
    "training.replay",
    "training.sft",
    "training.static_decoding",
    "training.supervised",
    "training.templates",
    "training.tokens",
    "training.vllm_sampler",
}


def exporting() -> list[str]:
    "The rooms, in the order of the notebooks that they are exported from."
    cells = [
        (path.name, "".join(cell["source"]))
        for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    return [found[1] for _, source in cells if (found := re.match(r"#\s*\|\s*default_exp ([\w.]+)", source))]


ORDER = exporting()
LIGHT = [room for room in ORDER if room not in HEAVY]


def loaded_by(code: str) -> set[str]:
    "Heavy libraries that a piece of code loads."
    probe = f"{code}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY_LIBRARIES} if m in sys.modules]))"
    return set(
        json.loads(
            subprocess.run(
                [sys.executable, "-c", probe], capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
    )


@pytest.fixture(scope="module")
def heavy_after() -> dict[str, list[str]]:
    "Heavy libraries that are loaded after each light room, in one process that imports them one by one."
    code = (
        f"import importlib, json, sys\nfound = {{}}\nfor room in {LIGHT}:\n"
        "    importlib.import_module(f'compassion_repro.{room}')\n"
        f"    found[room] = [m for m in {HEAVY_LIBRARIES} if m in sys.modules]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_load_no_heavy_library(room, heavy_after):
    assert heavy_after[room] == []


def test_help_and_plan_load_no_heavy_library():
    assert (
        loaded_by(
            "import contextlib\nfrom compassion_repro.cli import main\nwith contextlib.suppress(SystemExit):"
            " main(['--help'])"
        )
        == set()
    )
    assert loaded_by("from compassion_repro.cli import main\nmain(['plan'])") == set()


COMPAT = "compassion_repro/core/compat.py"  # the one module that may use them
# what Python itself documents with an underscore, and what rich displays look for
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make", "_repr_markdown_", "_repr_html_"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_libraries(source: str, own: set[str]) -> list[str]:
    "The private names of other packages that a module imports, reads or sets."
    found, imported = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | DOCUMENTED:
            found.append(node.attr)
    names = {name: name.split(".") for name in imported}
    ours = {"compassion_repro", *sys.stdlib_module_names}
    found += [name for name, parts in names.items() if parts[0] not in ours and any(map(private, parts))]
    return found


def own_names(sources: list[str]) -> set[str]:
    "Every private name that the package defines: functions, classes, variables, attributes of `self`."
    own = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
    return own


def test_private_names_of_libraries_are_in_one_module():
    modules = [p for p in (ROOT / "compassion_repro").rglob("*.py") if p.name != "_modidx.py"]
    sources = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in modules}
    own = own_names([source for name, source in sources.items() if name != COMPAT])
    found = {name: names for name in sources if (names := private_names_of_libraries(sources[name], own))}
    assert set(found) == {COMPAT}, found
    assert {"_tr_loss", "_n_gpu"} < set(found[COMPAT])


PAPERS_NAMES = re.compile(r"^[-@]?(help|code)$|\b(sft|grpo)-(help|code)\b")  # its domains, its arms


def papers_names(source: str) -> list[str]:
    "Strings of a module, docstrings aside, that name a domain or an arm of the paper."
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = list(ast.walk(ast.parse(source)))
    bodies = [node.body[0] for node in nodes if isinstance(node, documented) and node.body]
    docs = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
    strings = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in docs]
    return [text for text in strings if isinstance(text, str) and PAPERS_NAMES.search(text)]


def test_no_arm_or_domain_of_the_paper_is_named_where_arms_are_data():
    found = {}
    for package in ("training", "evaluation", "stats", "pipeline"):
        for path in sorted((ROOT / "compassion_repro" / package).glob("*.py")):
            if names := papers_names(path.read_text(encoding="utf-8")):
                found[path.relative_to(ROOT).as_posix()] = names
    assert not found
    arms = (ROOT / "compassion_repro" / "study" / "arms.py").read_text(encoding="utf-8")
    assert {"help", "code", "sft-help", "grpo-code"} <= set(papers_names(arms))  # where they are named


def test_no_module_imports_upward():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "architecture.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"],
        check=True,
        stdout=(tmp_path / "files").open("wb"),
    )
    for name in filter(None, (tmp_path / "files").read_bytes().decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
        capture_output=True,
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        f"compassion_repro/assets/report/{name}"
        for name in ("report.html.jinja", "audit.html.jinja", "score.html.jinja", "report.css")
    } <= set(names)
    assert (
        "compassion_repro/assets/presets/tiny.yaml" in names
        and "compassion_repro/assets/base/model.safetensors" in names
    )
    assert (
        sum(i.file_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.endswith(".safetensors"))
        <= 8 * 2**20
    )
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    check = (
        "import sys; sys.path.insert(0, 'site'); from compassion_repro import presets, study; from"
        " compassion_repro.data import world; from compassion_repro.training import models; assert"
        " study.__file__.startswith(sys.argv[1]), study.__file__; assert presets.load_preset('smoke'); assert"
        " models.load_model(models.find_model('world:base'), 'cpu').num_parameters() > 1e6;"
        " print(len(world.corpus('help', 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "3", done.stderr


def test_constraints_pin_torch_without_a_local_suffix():
    pins = (ROOT / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in pins and all("==" in pin and "+" not in pin for pin in pins)


def colab_check():
    "The tool, which belongs to no package."
    spec = importlib.util.spec_from_file_location("colab_check", ROOT / "tools" / "colab_check.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_a_plain_install_keeps_what_colab_has():
    assert colab_check().main([]) == 0


@pytest.mark.parametrize(
    "asked, needs, wrong",
    [
        (
            "torch>=2.13",
            {},
            "torch 2.11.0 would be replaced under a running session: compassion_repro requires torch>=2.13",
        ),
        (
            "trl",
            {"trl": ["numpy>=2.4"]},
            "numpy 2.1.3 would be replaced under a running session: trl requires numpy>=2.4",
        ),
        (
            "trl",
            {"trl": ["nothing"], "nothing": ["pandas<2"]},
            "pandas 2.2.3 would be replaced under a running session: nothing requires pandas<2",
        ),
        (
            "scipy>=1.17",
            {},
            (
                "scipy 1.16.3 would be replaced: compassion_repro requires scipy>=1.17: lower it or give a"
                " reason"
            ),
        ),
        ("datasets>=4.8.5", {}, None),
        # stays as it is, so what it requires is there
        ("transformers>=5.15", {"transformers": ["numpy>=9"]}, None),
    ],
)
def test_colab_check_names_what_would_be_replaced(asked, needs, wrong):
    tool = colab_check()
    there, wanted = tool.colab_versions(), [tool.Requirement(asked)]
    found = tool.replaced(
        wanted, there, lambda name: [tool.Requirement(line) for line in needs.get(name, [])]
    )
    assert tool.faults(found, there) == [wrong] * bool(wrong)


def test_the_citation_says_what_the_settings_say():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    own, cited = settings["DEFAULT"], yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited.pop("cff-version") == "1.2.0" and cited.pop("message")
    # as setup.py names it
    licence = re.search(r'license="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert cited == {
        "type": "software",
        "title": own["title"],
        "abstract": own["description"],
        "version": own["version"],
        "license": licence,
        "authors": [{"name": own["author"]}],
        "repository-code": own["git_url"],
        "keywords": own["keywords"].split(),
    }


def test_every_trainer_is_held_to_one_gpu():
    """Where it sees several, TRL's trainer would use them all in one process: SFT's batch would be multiplied, and
    the reward model's is refused.
    """
    configs = {"SFTConfig", "GRPOConfig", "RewardConfig", "DPOConfig"}
    made, held = set(), set()
    for path in sorted((ROOT / "compassion_repro").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            called = {
                call.func.id
                for call in ast.walk(function)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            }
            if called & configs:
                made.add((path.name, function.name))
            if called & configs and "on_one_gpu" in called:
                held.add((path.name, function.name))
    assert len(made) >= 3 and made == held, made - held
