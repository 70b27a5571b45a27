"""The measuring room: the command's refusals, the same lines at a size for processors, and the committed
figures held against the formulas that made them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_one_line

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "figures" / "bench_gpu.json").read_text())
RUNS = {name: run for name, run in FIGURES["parts"].items() if "tokens_per_second" in run}


def bench(*words):
    return subprocess.run(
        [sys.executable, "-m", "compassion_repro.cli", "bench", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_a_machine_without_a_gpu_is_told_in_one_line():
    assert_one_line(bench("--gpu"), "this machine has none", "80 GB")
    assert_one_line(bench("--vllm"), "add --gpu")
    assert_one_line(bench("--small"), "add --gpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "Four parts at a size for processors, from random weights to a JSON file."
    from compassion_repro.bench import gpu, model

    shape = {
        "vocab_size": 2400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    out, said = tmp_path_factory.mktemp("speed") / "bench.json", []
    sizes = model.Sizes(shape, (64,), 128, 3, 4, 2, 4, 1, 2, 2, 6, 64)
    result = gpu.measure(
        sizes,
        out,
        said.append,
        "cpu",
        only=lambda name: name in ("none/64/default", "nf4/64/ours", "grpo/nf4/15 GB", "profile"),
    )
    return result, json.loads(out.read_text()), said


def test_every_part_measures_and_is_saved(measured):
    result, saved, said = measured
    assert saved == result and len(said) == 4
    assert not [name for name, run in result["parts"].items() if "error" in run], result["parts"]
    assert (
        result["parts"]["nf4/64/ours"]["mfu"] > 0
        and result["parts"]["grpo/nf4/15 GB"]["parts"]["generation"] > 0
    )


def test_a_part_that_fails_is_the_only_one_lost(monkeypatch, tmp_path):
    from compassion_repro.bench import gpu, model

    def fails(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(
        gpu, "parts", lambda bench, vllm: {"bad": fails, "good": lambda: {"seconds_a_step": {"median": 1.0}}}
    )
    result = gpu.measure(
        model.Sizes(
            model.LLAMA_8B
            | {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 2400,
                "head_dim": 16,
            },
            product=32,
        ),
        tmp_path / "b.json",
        lambda line: None,
        "cpu",
    )
    assert result["parts"] == {
        "bad": {"error": "MemoryError: no room"},
        "good": {"seconds_a_step": {"median": 1.0}},
    }


def test_committed_figures_are_whole_and_follow_from_the_formulas():
    from compassion_repro.bench import model
    from compassion_repro.training.memory import KNOWN

    llama, rate = KNOWN["meta-llama/Llama-3.1-8B"], FIGURES["limits"]["operations"]["median"]
    assert FIGURES["model"] == model.LLAMA_8B and FIGURES["seconds"] < 480 and FIGURES["machine"]["commit"]
    assert not [name for name, run in FIGURES["parts"].items() if "error" in run]
    for name, run in RUNS.items():
        length, speed_of = int(name.split("/")[1]), run["tokens_per_second"]["median"]
        bounds = [model.flops_per_token(llama, [n]) * speed_of / rate for n in (1, length)]
        assert bounds[0] < run["mfu"] < bounds[1], name


def test_estimates_meet_the_committed_peaks():
    "The estimate is computed again, so that a change of the arithmetic that leaves the measured peaks shows."
    from compassion_repro.training.memory import KNOWN, Held, total, training_memory

    for name, run in RUNS.items():
        held, length, what = name.split("/")
        if what.startswith("default"):
            continue
        how = Held(
            FIGURES["rank"], held, 2, 2 if held == "nf4" else 8, what != "without Liger", what == "with masks"
        )
        estimate = total(
            training_memory(
                KNOWN["meta-llama/Llama-3.1-8B"], run["micro_batch"] * int(length), how, run["checkpointing"]
            )
        )
        assert abs(estimate / run["peak_gb"] - 1) < 0.1, (name, estimate, run["peak_gb"])


def test_vllm_beside_the_plain_sampler():
    "Both runs of one commit and one size; the estimate of what vLLM takes is held against the peak."
    by_vllm, plain = (
        json.loads((ROOT / "figures" / "bench_gpu_vllm.json").read_text()),
        FIGURES["parts"]["grpo/none"],
    )
    run = by_vllm["parts"]["grpo/none/vllm"]
    assert (by_vllm["machine"]["commit"], run["completions"], run["tokens"]) == (
        FIGURES["machine"]["commit"],
        plain["completions"],
        plain["tokens"],
    )
    from compassion_repro.study import Grpo
    from compassion_repro.training.memory import KNOWN, Held, fit

    training = Grpo(
        settings="trl",
        engine="vllm",
        group=8,
        prompts_per_step=8,
        micro_batch=run["micro_batch"],
        max_prompt_tokens=20,
        max_new_tokens=64,
    )
    llama = KNOWN["meta-llama/Llama-3.1-8B"]
    assert (
        abs(
            fit(training, llama, Held(32, liger=True), 1e6, "never", 2 * llama.parameters).gb / run["peak_gb"]
            - 1
        )
        < 0.1
    )
