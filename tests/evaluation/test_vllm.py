"""vLLM as the generator: through a stand-in with its signatures everywhere, and through the real library
where `COMPASSION_VLLM_PYTHON` names a Python that has it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.evaluation import generate, vllm_process
from compassion_repro.pipeline import run
from compassion_repro.presets import load_preset
from compassion_repro.store.graph import graph
from compassion_repro.study import Generation
from compassion_repro.training import models

REAL = os.environ.get("COMPASSION_VLLM_PYTHON")
QUESTIONS = [
    dict(
        benchmark="mine",
        language="en",
        item_id=str(i),
        question_id=str(i),
        question=f"How do I wash a {thing}?",
        epochs=2,
    )
    for i, thing in enumerate(("kettle", "dog", "van"))
]

STAND_IN = """
import os, pathlib, time, types
__version__ = "stand-in"
class SamplingParams:
    def __init__(self, n, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words, watermarking, max_tokens,
                 min_tokens, stop, stop_token_ids, ignore_eos, detokenize, skip_special_tokens, seed): self.__dict__.update(locals())
class LLM:
    def __init__(self, model, *, generation_config, skip_tokenizer_init, trust_remote_code, dtype, seed, max_model_len, gpu_memory_utilization=0.92):
        assert generation_config == "vllm"
        print("chatter on standard output")
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        if slow := os.environ.get("SLOW"):
            pathlib.Path(slow).write_text(str(os.getpid()))
            time.sleep(60)
        tokens = [[*p["prompt_token_ids"][1:4], *s.stop_token_ids] for p, s in zip(prompts, sampling_params, strict=True)]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids))]) for ids in tokens]
"""


@pytest.fixture
def python(tmp_path) -> str:
    "A Python that finds a stand-in for vLLM; it leaves out the `-I` that would shut PYTHONPATH out."
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "vllm.py").write_text(STAND_IN)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path / "lib"} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def asked(python: str, folder: Path = world.assets() / "base", **settings):
    generation = Generation(max_new_tokens=24, batch_size=8, engine="vllm", **settings)
    return generate.generate_answers(
        folder, "mid", QUESTIONS, 0, generation, report=lambda line: None, python=python
    )


def test_answers_come_back_in_the_saved_form(python):
    built_in = generate.generate_answers(
        world.assets() / "base", "mid", QUESTIONS, 0, Generation(max_new_tokens=24), report=lambda line: None
    )
    answers = asked(python)
    assert (
        answers.columns.tolist() == built_in.columns.tolist()
        and answers.prompt.tolist() == built_in.prompt.tolist()
    )
    assert (
        set(answers.stop_reason) == {"stop"}
        and set(answers.tokens) == {3}
        and answers.text.str.startswith("Question").all()
    ), answers.text.tolist()
    assert answers.attrs["engine"] == "vllm stand-in"


def test_an_adapter_is_merged_first(python, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        models.load_model(world.assets() / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "world:base"}))
    assert asked(python, tmp_path / "adapter").text.tolist() == asked(python).text.tolist()


def test_only_the_other_generator_changes_a_key():
    keys = [
        {s.id: s.key for s in graph(load_preset("smoke", words))}
        for words in ((), ["compute.vllm_python=/some/python"], ["generation.engine=vllm"])
    ]
    assert keys[0] == keys[1]
    changed = {name for name in keys[0] if keys[0][name] != keys[2][name]}
    assert changed == {name for name in keys[0] if name.startswith(("answers-", "eval-", "probe-"))}


def test_no_vllm_is_one_clear_line_before_any_training(tmp_path):
    with pytest.raises(InputError) as error:
        run.run(load_preset("smoke", ["generation.engine=vllm"]), tmp_path / "study", say=lambda line: None)
    assert (
        "has no vLLM" in str(error.value)
        and "compute.vllm_python" in str(error.value)
        and "\n" not in str(error.value)
    )
    assert not list(tmp_path.glob("study/seed-*/*"))


def gone(pid: int, seconds: float = 120) -> bool:
    "Whether a process ends in time; a dead one that nobody has waited for counts as gone."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_engine_ends_with_its_parent(python, tmp_path):
    "Killed without warning, a run leaves no engine behind that holds the GPU."
    note = tmp_path / "pid"
    code = (
        "from compassion_repro.evaluation.vllm_process import complete, sampling; from"
        " compassion_repro.study import Generation; complete([([1, 2], 3)], dict(model='m',"
        " generation_config='vllm', skip_tokenizer_init=True, trust_remote_code=False, dtype='float32',"
        f" seed=0, max_model_len=9), sampling(Generation(), [1]), {python!r})"
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        note.unlink(missing_ok=True)
        with subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"SLOW": str(note)}, stderr=subprocess.DEVNULL
        ) as parent:
            while not (note.exists() and note.read_text()):
                time.sleep(0.05)
            parent.send_signal(number)
            parent.wait()
        assert gone(int(note.read_text()))


@pytest.mark.skipif(not REAL, reason="COMPASSION_VLLM_PYTHON names no Python that has vLLM")
def test_the_real_library_agrees_with_the_built_in_generator(tmp_path):
    """At temperature 0 both write the same tokens; at 1 an answer is repeatable, and the file beside the
    model changes nothing.
    """
    greedy = generate.generate_answers(
        world.assets() / "base",
        "mid",
        QUESTIONS,
        0,
        Generation(max_new_tokens=60, temperature=0),
        report=lambda line: None,
    )
    theirs = generate.generate_answers(
        world.assets() / "base",
        "mid",
        QUESTIONS,
        0,
        Generation(max_new_tokens=60, temperature=0, engine="vllm"),
        report=lambda line: None,
        python=REAL,
    )
    compared = ["question_id", "epoch", "prompt", "text", "tokens", "stop_reason"]
    assert theirs[compared].equals(greedy[compared])
    plain = asked(REAL)
    assert plain.text.nunique() == len(plain)
    folder = Path(shutil.copytree(world.assets() / "base", tmp_path / "base"))
    file = folder / "generation_config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {
                "do_sample": True,
                "temperature": 0.1,
                "top_k": 1,
                "repetition_penalty": 9.0,
                "max_new_tokens": 3,
            }
        )
    )
    assert asked(REAL, folder).text.tolist() == plain.text.tolist()
    assert vllm_process.request_seed(0) != vllm_process.request_seed(1)
