"""A stage in several processes: the same batches, losses and weights as with one, and no process left behind
when something goes wrong.
"""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from conftest import FORKS
from trl import GRPOTrainer, SFTTrainer

from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.data.rows import load
from compassion_repro.presets import load_preset
from compassion_repro.study import Compute, Grpo, Lora, Training
from compassion_repro.training import grpo, processes
from compassion_repro.training import supervised as midtrain
from compassion_repro.training.device import TrainRun, TrainSetup, load_held
from compassion_repro.training.encoding import IGNORE
from compassion_repro.training.processes import run_distributed, share
from compassion_repro.training.templates import load_tokenizer

BASE = world.assets() / "base"
SFT = Training(steps=6, batch_size=8, micro_batch=2, length=128, learning_rate=3e-3)
GRPO = Grpo(steps=2, group=4, prompts_per_step=4, micro_batch=4, max_new_tokens=12, learning_rate=3e-3)


def held(count: int, sharding: str = "none"):
    return TrainSetup(compute=Compute(device="cpu", processes=count, sharding=sharding))


def documents(batch) -> set:
    "The documents of a micro-batch as (tokens, labels); empty ones have no label."
    ids, labels, starts = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    borders = [place for place, position in enumerate(starts) if position == 0] + [len(ids)]
    pairs = [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in zip(borders, borders[1:])]
    return {pair for pair in pairs if set(pair[1]) != {IGNORE}}


class Watched(SFTTrainer):
    "TRL's trainer, which remembers what it saw in each step."

    def training_step(self, model, inputs, *words):
        self.seen = getattr(self, "seen", [])
        self.seen.append((self.state.global_step, documents(inputs)))
        return super().training_step(model, inputs, *words)


def by_step(seen) -> list[list]:
    "What all processes saw, step by step, each document as often as it came."
    steps = {}
    for step, found in gather_object(seen) if processes.count() > 1 else seen:
        steps.setdefault(step, []).extend(found)
    return [sorted(steps[step]) for step in sorted(steps)]


def supervised(lora, how, report):
    "Train on 20 rows, three of which are left for the last step of a pass."
    made = []

    def trainer(*words, **named):
        return made.append(Watched(*words, **named)) or made[0]

    midtrain.SFTTrainer, before = trainer, midtrain.SFTTrainer
    part = share(SFT, processes.count())
    try:
        model, done = midtrain.train(
            load_held(BASE, how),
            load_tokenizer(BASE),
            world.corpus("help", 19, seed=1),
            part,
            SFT.steps,
            TrainRun(1, lora, report, "supervised", setup=how),
        )
    finally:
        midtrain.SFTTrainer = before
    return model, {
        "losses": [record["loss"] for record in done["log"]],
        "steps": by_step(made[0].seen),
        **{name: done[name] for name in ("tokens", "loss_tokens", "passes")},
    }


def written(trainer, prompt_ids, *words):
    "Completions that depend on the prompt and their place in its group alone, in place of sampled ones."
    names = [place % GRPO.value("group") for place in range(len(prompt_ids))]
    return [
        [1000 + (sum(ids) * 7 + 131 * name + 17 * n) % 500 for n in range(6 + name)]
        for ids, name in zip(prompt_ids, names)
    ], None


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, answer[0]["content"])) % 17) for answer in completions]


def reinforced(how, report):
    """GRPO on completions that are given: rewards, advantages and losses are then the same whoever works them
    out.
    """
    GRPOTrainer._generate_single_turn, before = written, GRPOTrainer._generate_single_turn
    prompts = grpo.prompt_rows(
        load("world:code", "prompts", limit=12, seed=1).rows, load_tokenizer(BASE), 200
    )
    try:
        model, told = grpo._train(
            BASE,
            prompts,
            share(GRPO, processes.count()),
            letters,
            TrainRun(1, Lora(rank=4), report, "grpo", setup=how),
            None,
            False,
        )
    finally:
        GRPOTrainer._generate_single_turn = before
    return model, {
        name: [record[name] for record in told["log"]]
        for name in ("loss", "reward", "reward_spread", "kl", "length")
    }


def weights(model) -> dict:
    return {
        name: value.numpy()
        for name, value in model.state_dict().items()
        if model.get_parameter(name).requires_grad
    }


def all_three(how, report):
    "An adapter, every weight, and GRPO, one after the other in the same processes."
    _, adapter = supervised(Lora(rank=4), how, report)
    policy, rewarded = reinforced(how, report)
    model, whole = supervised(None, how, report)
    return model, {"adapter": adapter, "whole": whole, "grpo": rewarded, "policy": weights(policy)}


REAL, CONFIG = processes._process, processes._launch_config


def from_the_server(*words):
    "A process whose parent is the one that forks, and not this one."
    return REAL(*words[:-1], os.getppid())


@pytest.fixture(scope="module")
def quick_start():
    """Processes that are forks of one that has imported the libraries, which takes most of the time; those of
    users are new Pythons, as in the test of Ctrl-C.
    """
    multiprocessing.set_forkserver_preload(["trl.trainer.grpo_trainer", "trl.trainer.sft_trainer", "peft"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        patch.setattr(processes, "_process", from_the_server)
        patch.setattr(
            processes, "_launch_config", lambda *words: replace(CONFIG(*words), start_method="forkserver")
        )
        yield
    forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def one_and_two(quick_start):
    lines = []
    (one, alone), _ = run_distributed(partial(all_three, held(1)), BASE, held(1), lambda line: None)
    (two, together), spent = run_distributed(partial(all_three, held(2)), BASE, held(2), lines.append)
    return alone | {"model": weights(one)}, together | {"model": weights(two)}, spent, lines


@pytest.mark.parametrize("what", ["adapter", "whole"])
def test_two_processes_see_the_batches_of_one_and_lose_the_same(one_and_two, what):
    one, two = (told[what] for told in one_and_two[:2])
    assert one["steps"] == two["steps"] and [len(step) for step in one["steps"]] == [8, 8, 3] * 2
    assert one["steps"][0] != one["steps"][3]  # the passes differ in their order
    assert {k: one[k] for k in ("tokens", "loss_tokens", "passes")} == {
        k: two[k] for k in ("tokens", "loss_tokens", "passes")
    }
    assert np.abs(np.subtract(one["losses"], two["losses"])).max() < 1e-5 and np.ptp(one["losses"]) > 0.01


def test_two_processes_end_with_the_same_weights(one_and_two):
    one, two, spent, lines = one_and_two
    for kept in ("model", "policy"):
        assert one[kept].keys() == two[kept].keys()
        assert max(np.abs(one[kept][name] - two[kept][name]).max() for name in one[kept]) < 1e-4
    assert spent["processes"] == 2 and 100 < spent["process_peak_mb"] < 5000
    assert [line.split(",")[0] for line in lines] == [
        f"{name}: step {n}/{last}"
        for name, last in (("supervised", 6), ("grpo", 2), ("supervised", 6))
        for n in range(1, last + 1)
    ]


def test_grpo_in_two_processes_has_the_same_rewards_and_losses(one_and_two):
    one, two = (told["grpo"] for told in one_and_two[:2])
    for name in one:  # TRL reports KL as a mean over micro-batches, which it shuffles within a process
        assert np.allclose(one[name], two[name], atol=1e-5, rtol=0.02 if name == "kl" else 1e-5), (
            name,
            one[name],
            two[name],
        )
    assert one["reward_spread"][0] > 1 and one["kl"][1] > 0  # something was learned from


def no_process_left() -> bool:
    "Whether this process has no child but those that were there before: the tracker, the ones that fork."
    forks = FORKS.process.pid if FORKS.process else None
    return all(
        child.pid == forks
        or {"resource_tracker", "forkserver"} & set(re.split(r"\W", " ".join(child.cmdline())))
        for child in psutil.Process().children()
    )


def told_to_be_gpus(*words):
    """Accelerate spreads weights over GPUs alone; told that two processors are such, it does everything else
    as there.
    """
    device = PartialState.set_device

    def set_device(state):
        device(state)
        state.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = set_device
    return from_the_server(*words)


def spread_weights(folder, how, report):
    "Train, write and tell; then the second process refuses, while the first waits for it."
    model, told = supervised(Lora(rank=4), how, _quiet)
    processes._write(model, folder, True)
    report(
        json.dumps(told | {"kinds": sorted({type(weight.data).__name__ for weight in model.parameters()})})
    )
    if not processes.is_first():
        raise InputError("the rows are no rows: give others")
    torch.distributed.barrier()


def _quiet(line):
    pass


def test_weights_spread_over_two_processes_train_the_same_and_a_failure_in_one_ends_all(
    one_and_two, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(processes, "_process", told_to_be_gpus)
    lines = []
    with pytest.raises(InputError, match="^the rows are no rows: give others$"):
        run_distributed(
            partial(spread_weights, tmp_path, held(2, "fsdp")), BASE, held(2, "fsdp"), lines.append
        )
    # what bitsandbytes says when this file imports it
    assert (
        no_process_left()
        and [line for line in capfd.readouterr().err.splitlines() if "gemm_4bit_forward" not in line] == []
    )
    told, one = json.loads(lines[0]), one_and_two[0]["adapter"]
    assert told["kinds"] == ["DTensor"] and told["steps"] == json.loads(json.dumps(one["steps"]))
    assert np.abs(np.subtract(told["losses"], one["losses"])).max() < 1e-5
    adapter = processes._opened(tmp_path, BASE, held(1))
    assert all(weight.abs().max() > 0 for name, weight in adapter.named_parameters() if "lora_B" in name)


def waits(how, report):
    report(f"waiting {os.getpid()}")
    time.sleep(900)


@pytest.mark.long
def test_ctrl_c_leaves_no_process_behind(monkeypatch):
    from compassion_repro.core.signals import raise_on_signal

    monkeypatch.setattr(processes, "_process", REAL)
    monkeypatch.setattr(processes, "_launch_config", CONFIG)
    lines = []

    def report(line):
        # settings of a launcher that this machine has are named first
        if not line.startswith("waiting"):
            return
        lines.append((line, time.perf_counter()))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt), raise_on_signal():
        run_distributed(partial(waits, held(2)), BASE, held(2), report)
    [(line, began)] = lines
    # it was not waited for
    assert not psutil.pid_exists(int(line.split()[1])) and time.perf_counter() - began < 600
    assert no_process_left()


class Failed:
    "What the launcher says of a failed process."

    def __init__(self, exitcode: int):
        self.exitcode = exitcode

    def get_first_failure(self):
        return 1, self

    def signal_name(self):
        return signal.Signals(-self.exitcode).name


@pytest.mark.parametrize(
    "notes, code, kind, words",
    [
        (
            ["RuntimeError: Connection closed by peer", "OutOfMemoryError: CUDA out of memory. Tried"],
            1,
            torch.OutOfMemoryError,
            "CUDA out of memory",
        ),
        (
            ["RuntimeError: Connection closed by peer", "InputError: give others"],
            1,
            InputError,
            "give others",
        ),
        (
            ["ValueError: odd\nand more"],
            1,
            RuntimeError,
            "sft-help: process 1 of the training failed: ValueError: odd",
        ),
        ([], -9, InputError, "sft-help: process 1 of the training was ended by SIGKILL"),
        ([], 1, RuntimeError, "it wrote nothing down"),
    ],
)
def test_what_the_processes_wrote_down_becomes_one_line(tmp_path, notes, code, kind, words):
    for rank, note in enumerate(notes):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "error.json").write_text(
            json.dumps(
                {"message": {"message": note, "extraInfo": {"py_callstack": "Traceback", "timestamp": "1"}}}
            )
        )
    error = processes._failure(str(tmp_path), Failed(code), "sft-help")
    assert type(error) is kind and words in str(error) and "\n" not in str(error)


def test_the_committed_configurations_are_accelerates_own(monkeypatch):
    places = {
        name: str(world.assets() / "accelerate" / file) for name, file in processes.CONFIGURATIONS.items()
    }
    assert [load_config_from_file(place).distributed_type.value for place in places.values()] == [
        "MULTI_GPU",
        "FSDP",
    ]
    for name, value in processes.launch_environment("fsdp", 2).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    plugin.set_auto_wrap_policy(model := load_held(BASE, held(1)))
    assert plugin.auto_wrap_policy is not None and model._no_split_modules


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", ["tiny", "paper", "colab", "smoke"])
def test_effective_batch_does_not_depend_on_the_processes(preset, count):
    stages = load_preset(preset)
    for stage in (stages.midtrain, stages.sft, stages.grpo):
        whole = stage.batch_size if isinstance(stage, Training) else stage.completions
        try:
            part = share(stage, count)
        except InputError as error:
            assert whole // getattr(stage, "value", lambda name: 1)("group") % count, error
        else:
            assert (part.batch_size if isinstance(part, Training) else part.completions) * count == whole
            assert part.micro_batch == "auto" or part.micro_batch * part.accumulation * count == whole
