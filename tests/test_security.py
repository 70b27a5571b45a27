"""What must never happen: a key that is written or shown, code that came with a file, a path out of the
study's folder. Pickles and modules here would leave a mark if they were opened.
"""

import ast
import importlib.util
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, settings
from damage import call, nothing_runs
from judge_server import JUDGE, PaidJudge

from compassion_repro.data import world

CANARY = "CANARY0123456789"
KEYS = {
    name: f"{name.lower()}-{CANARY}"
    for name in (
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "GOOGLE_API_KEY",
        "GEMINI_API_KEY",
        "ANTHROPIC_API_KEY",
        "STANDIN_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
    )
}


def refused(words: tuple, folder: Path, *parts: str):
    "Run a command that must be refused in one line."
    status, out, err = call(tuple(map(str, words)), folder)
    assert status == 2 and err.startswith("compassion-repro: ") and err.count("\n") == 1, (
        status,
        out[-500:],
        err[-1000:],
    )
    for part in parts:
        assert part in err, err
    return err


# ---- keys and tokens


def holding(folder: Path, secret: bytes) -> list[str]:
    "Files that hold a text, whatever their names, in archives too."
    import zipfile_zstd  # Inspect's logs are archives in this compression

    found = []
    for file in (p for p in folder.rglob("*") if p.is_file()):
        if secret in file.read_bytes():
            found.append(str(file.relative_to(folder)))
        if not zipfile.is_zipfile(file):
            continue
        with zipfile.ZipFile(file) as archive:
            found += [
                f"{file.relative_to(folder)}: {name}"
                for name in archive.namelist()
                if secret in archive.read(name)
            ]
    return found


def test_the_search_for_keys_finds_them(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"x" + CANARY.encode())
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sample.json", CANARY * 9)
    assert holding(tmp_path, CANARY.encode()) == [".hidden", "log.eval: sample.json"]


@pytest.mark.long
def test_keys_are_neither_written_nor_shown(study_copy, tmp_path, monkeypatch):
    "A run that makes grades anew, a judge that works, and one that repeats the key which it refuses."
    for name, value in {
        **KEYS,
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    shutil.rmtree(study_copy / "seed-1" / "eval-sft-help")
    judged = ("judge", str(study_copy), "--judge", JUDGE, "--yes", "--judge-retries", "0")
    said = [
        call(("run", "--preset", "smoke", "--out", str(study_copy), "--no-report", *settings()), tmp_path)
    ]
    # an unfinished study is judged without its report being drawn again, which takes most of the time
    shutil.rmtree(study_copy / "seed-1" / "probe-base")
    message = f"Incorrect API key provided: {KEYS['STANDIN_API_KEY']} (or {KEYS['OPENAI_API_KEY']}?)"
    for judge in (
        PaidJudge(refusal=(401, {"error": {"message": message, "code": "invalid_api_key"}})),
        PaidJudge(),
    ):
        with judge, monkeypatch.context() as patch:
            patch.setenv("STANDIN_BASE_URL", judge.environment()["STANDIN_BASE_URL"])
            said.append(call(judged, tmp_path))
    said += [
        call(("doctor",), tmp_path),
        call(("judge", str(study_copy), "--judge", "openai-api/nowhere/judge", "--yes"), tmp_path),
    ]
    assert [status for status, *_ in said] == [0, 2, 0, 0, 2], said
    assert "[STANDIN_API_KEY]" in said[1][2] and "[OPENAI_API_KEY]" in said[1][2], said[1]
    assert not [text for _, *texts in said for text in texts if CANARY in text]
    assert list(study_copy.rglob("*.eval")) and (study_copy / "judge-replies.sqlite").exists()
    assert holding(tmp_path, CANARY.encode()) == []


# ---- code that comes with files


class Bomb:
    "Leaves a mark where it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    "Must not exist when the test is over."
    yield (mark := tmp_path / "opened")
    assert not mark.exists(), "code that came with a file was run"


def model_folder(folder: Path, mark: Path, safe: bool) -> Path:
    "A copy of the embedded base with pickles and a module that leave marks, with its safetensors or without."
    shutil.copytree(world.assets() / "base", folder)
    for name in ("pytorch_model.bin", "model.pt", "weights.pth", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config
            | {
                "auto_map": {
                    "AutoConfig": "modeling_own.Own",
                    "AutoModelForCausalLM": "modeling_own.Own",
                    "AutoTokenizer": ["modeling_own.Own", None],
                }
            }
        )
    )
    if not safe:
        (folder / "model.safetensors").unlink()
    return folder


def test_the_bomb_goes_off_where_it_is_opened(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "opened")))
    assert (tmp_path / "opened").is_dir()


def test_pickled_weights_are_refused(tmp_path, mark):
    folder, run = (
        model_folder(tmp_path / "model", mark, safe=False),
        (
            "run",
            "--preset",
            "smoke",
            "--out",
            tmp_path / "study",
            *settings(),
        ),
    )
    refused((*run, "--set", f"models.base={folder}"), tmp_path, "pickle", "safetensors")
    refused((*run, "--set", f"models.given.mid={folder}"), tmp_path, "pickle", "safetensors")
    refused(
        ("eval", folder, "--bench", "tiny-anima", "--judge", "indicator", "--out", tmp_path / "evaluation"),
        tmp_path,
        "pickle",
        "safetensors",
    )
    refused(
        (
            "run",
            "--preset",
            "smoke",
            "--out",
            tmp_path / "grpo",
            *settings("arms=[grpo-help]", f"models.reward={folder}"),
        ),
        tmp_path,
        "safetensors",
    )
    assert not mark.exists()


def test_code_beside_safetensors_is_not_run(tmp_path, mark):
    folder = model_folder(tmp_path / "model", mark, safe=True)
    status, _, err = call(
        (
            "eval",
            str(folder),
            "--bench",
            "tiny-anima",
            "--judge",
            "indicator",
            "--limit",
            "1",
            "--epochs",
            "1",
            "--max-tokens",
            "4",
            "--out",
            str(tmp_path / "evaluation"),
        ),
        tmp_path,
    )
    # used without its code, or refused; never with it
    assert status in (0, 2) and "Traceback" not in err, err


def test_a_data_folder_with_a_script_or_a_pickle_is_only_data(tmp_path, mark):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (tmp_path / "rows" / "train.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    refused(
        (
            "run",
            "--preset",
            "smoke",
            "--out",
            tmp_path / "study",
            *settings(f"data.sft-help={tmp_path / 'rows'}"),
        ),
        tmp_path,
        "rows",
    )
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    refused(
        (
            "run",
            "--preset",
            "smoke",
            "--out",
            tmp_path / "study",
            *settings(f"data.sft-help={tmp_path / 'rows.pkl'}"),
        ),
        tmp_path,
        "unknown kind of file",
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    "pattern, why",
    [
        (r"trust_remote_code\s*=\s*True", "code of a repository would be run"),
        (
            r"\bpickle\.loads?\(|\bjoblib\b|allow_pickle\s*=\s*True|read_pickle",
            "a pickle may run code when opened",
        ),
        (
            r"torch\.load\((?![^)]*weights_only\s*=\s*True)",
            "torch.load opens pickles unless weights_only is set",
        ),
        (
            r"yaml\.(unsafe_load|full_load)\(|yaml\.(Unsafe|Full)?Loader\b|yaml\.load\((?!(?s:.{0,300})SafeLoader)",
            "only a safe loader reads plain values",
        ),
        (r"shell\s*=\s*True|os\.system\(", "a shell reads more in a file's name than a name"),
    ],
)
def test_the_package_opens_nothing_that_runs_code(pattern, why):
    for room in (ROOT / "compassion_repro").rglob("*.py"):
        assert not re.search(pattern, room.read_text(encoding="utf-8")), f"{room.name}: {why}"


def test_every_call_that_opens_a_model_refuses_its_code():
    for file in (ROOT / "compassion_repro").rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            said = '"trust_remote_code": False' in ast.unparse(function).replace("'", '"')
            for opened in filter(lambda node: isinstance(node, ast.Call), ast.walk(function)):
                opener = ast.unparse(opened.func)
                if not re.fullmatch(r"(\w+\.)?Auto\w+\.from_pretrained", opener):
                    continue
                given = {word.arg: ast.unparse(word.value) for word in opened.keywords}
                assert given.get("trust_remote_code") == "False" or None in given and said, (
                    f"{file.name}: {ast.unparse(opened)}"
                )
    judges = (ROOT / "compassion_repro" / "evaluation" / "judges.py").read_text(encoding="utf-8")
    assert '"trust_remote_code": False' in judges  # Inspect opens a judge's folder


# ---- paths

OUTSIDE = (
    "name=../../outside",
    "name=/tmp/outside",
    "models.given={'../../outside': 'world:base'}",
    "arms=['../../outside']",
    "arms=['sft-help@../../outside']",
    "benchmarks={'../../outside': {task: anima, data: 'world:anima', epochs: 1, size: {en: 1}}}",
    "benchmarks.anima.data=world:../../outside",
    "data.sft-help=world:../../outside",
    "data.documents=world:/etc/passwd",
    "generation.template=../../outside",
)


@pytest.mark.parametrize("setting", OUTSIDE)
def test_no_setting_names_a_path_out_of_the_study(setting, tmp_path):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    with nothing_runs():
        status, _, err = call(
            ("run", "--preset", "smoke", "--out", str(home / "study"), *settings(setting)), tmp_path
        )
    # a benchmark may have any name: it is none of a file
    assert status == 2 and err.count("\n") == 1 or "unexpected Accepted" in err, err
    assert {p.relative_to(tmp_path).parts[:3] for p in tmp_path.rglob("*") if p.is_file()} <= {
        ("a", "b", "study")
    }


def test_a_study_from_a_stranger_writes_nothing_outside_itself(study_copy, tmp_path):
    "A configuration that was made by hand, in a folder that came from elsewhere."
    file = study_copy / "study.yaml"
    file.write_text(file.read_text().replace("name: smoke", "name: ../../outside"))
    refused(("report", study_copy), tmp_path, "study.yaml")
    assert not list(tmp_path.parent.rglob("outside*"))


# ---- pins


def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_audit_does_not_take_silence_for_health():
    judge = audit().judge
    known, silent = (
        {"name": "numpy", "version": "1.0", "vulns": []},
        {
            "name": "torch",
            "skip_reason": "not found",
        },
    )
    bad = {"name": "pyyaml", "version": "5.1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["5.4"]}]}
    assert judge(None)[0] == judge([])[0] == judge([silent])[0] == 2
    assert judge([known, silent]) == (
        0,
        ["1 of 2 pins looked up (not in the database: torch); 0 known vulnerabilities"],
    )
    assert judge([known, bad]) == (
        1,
        ["pyyaml 5.1: PYSEC-1, fixed in 5.4", "2 of 2 pins looked up; 1 known vulnerabilities"],
    )


def test_every_requirement_is_pinned():
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = re.findall(
        r"^(?:requirements|dev_requirements|judge_requirements) = (.+)$",
        (ROOT / "settings.ini").read_text(),
        flags=re.M,
    )
    assert len(wanted) == 3
    for word in " ".join(wanted).split():
        assert (name := re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[]", word)[0]).lower()) in pins, name
