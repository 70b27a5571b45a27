"""The hub over real HTTP, against a stand-in server: what is fetched, kept, taken up again and refused;
presets at scale; publishing.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from compassion_repro import presets
from compassion_repro.core.errors import InputError
from compassion_repro.data import hub, world
from compassion_repro.data import rows as data
from compassion_repro.training import adapters, models

DOLLY_ROWS = [
    {
        "instruction": "Who wrote it?",
        "context": "Emma is by Jane Austen.",
        "response": "Jane Austen.",
        "category": "closed_qa",
    }
] * 3
JSON_LINES = lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A hub of our own, an empty cache, and no token."
    running = HubServer()
    for name, value in (
        ("ENDPOINT", running.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_OFFLINE", False),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield running
    running.close()


def files_fetched(server):
    return [
        path.split("/resolve/")[1].partition("/")[2]
        for method, path, _ in server.requests
        if method == "GET" and "/resolve/" in path
    ]


def assert_refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and "hf_" not in message, message
    for word in words:
        assert word in message, message
    return message


# --- what is fetched
# ------------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_at_its_commit_without_pickles_or_programs(server):
    files = {f.name: f.read_bytes() for f in (world.assets() / "base").iterdir() if f.is_file()}
    there = server.add(
        "model",
        "someone/tiny",
        {
            **files,
            "pytorch_model.bin": b"\x80",
            "modeling.py": b"boom",
            "original/consolidated.safetensors": b"no",
            "tokenizer.pickle": b"\x80",
        },
    )
    found = hub.snapshot("someone/tiny", "model")
    assert found.revision == there.commit and hub.snapshot(f"someone/tiny@{there.commit}", "model") == found
    assert {p.name for p in found.folder.iterdir()} == {name for name in files if not name.startswith(".")}
    assert models.load_model(found.folder, "cpu").num_parameters() > 1e6
    assert models.find_model("someone/tiny") == found.folder


def test_a_second_call_fetches_no_file_again(server):
    server.add("dataset", "someone/rows", {"train.jsonl": JSON_LINES(DOLLY_ROWS)})
    hub.snapshot("someone/rows", "dataset")
    before = files_fetched(server)
    hub.snapshot("someone/rows", "dataset")
    assert before == ["train.jsonl"] == files_fetched(server)


@pytest.mark.parametrize(
    "layout", ["train.jsonl", "databricks-dolly-15k.jsonl", "data/train-00000-of-00001.parquet", "described"]
)
def test_a_data_set_of_the_hub_loads_like_the_folder_it_is(server, tmp_path, layout):
    folder = tmp_path / "local"
    folder.mkdir()
    if layout == "described":
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: odd.jsonl}]\n---\n"
        )
        (folder / "odd.jsonl").write_bytes(JSON_LINES(DOLLY_ROWS))
    elif layout.endswith(".parquet"):
        import pandas as pd

        (folder / "data").mkdir()
        pd.DataFrame(DOLLY_ROWS).to_parquet(folder / layout)
    else:
        (folder / layout).write_bytes(JSON_LINES(DOLLY_ROWS))
    there = server.add("dataset", "someone/rows", folder)
    fetched, local = data.load("someone/rows", "messages"), data.load(folder, "messages")
    assert fetched.rows == local.rows and len(fetched) == 3
    assert (fetched.report.revision, local.report.revision) == (there.commit, "local")


def test_a_known_repository_is_fetched_at_its_pinned_commit(server):
    name = "databricks/databricks-dolly-15k"
    server.add(
        "dataset", name, {"rows.jsonl": JSON_LINES(DOLLY_ROWS)}, commit=presets.PUBLISHED[name].revision
    )
    assert data.load(name, "messages").report.revision == presets.PUBLISHED[name].revision
    assert not any("main" in path for _, path, _ in server.requests)


def test_a_branch_is_pinned_to_todays_commit(server, monkeypatch):
    there = server.add("dataset", "someone/rows", {"train.jsonl": JSON_LINES(DOLLY_ROWS)})
    assert (
        hub.pin("someone/rows", "dataset")
        == hub.pin("someone/rows@main", "dataset")
        == f"someone/rows@{there.commit}"
    )
    assert_refused(lambda: hub.pin("someone/rows@v9", "dataset"), "no revision 'v9'")
    assert_refused(lambda: hub.pin("someone/nothing", "model"), "no such model")
    data.load("someone/rows@main", "messages")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.pin("someone/rows", "dataset") == f"someone/rows@{there.commit}"


def test_no_data_sets_library_cache_mixes_two_repositories_of_one_name(server):
    for owner, text in (("one", "A memo."), ("two", "A report.")):
        server.add("dataset", f"{owner}/rows", {"train.jsonl": JSON_LINES([{"text": text}] * 2)})
    assert [data.load(f"{owner}/rows", "text").rows[0]["text"] for owner in ("one", "two")] == [
        "A memo.",
        "A report.",
    ]


# --- interrupted, damaged, offline
# ----------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what arrives is kept in steps of 10 MB
    content = JSON_LINES([{"text": f"Memo {n}."} for n in range(2000)])
    server.add("dataset", "someone/rows", {"train.jsonl": content})
    server.breaks["train.jsonl"] = 1
    assert len(data.load("someone/rows", "text")) == 2000
    ranges = [
        asked for method, path, asked in server.requests if method == "GET" and path.endswith("train.jsonl")
    ]
    assert len(ranges) == 2 and ranges[0] is None and 10_000 < int(ranges[1][6:-1]) <= len(content) // 2


def test_finished_files_are_kept_when_a_download_stops(server):
    rows = JSON_LINES([{"text": "A memo."}] * 2)
    server.add("dataset", "someone/rows", {"README.md": b"# Rows\n", "train.jsonl": rows})
    server.repositories["dataset", "someone/rows"].files["train.jsonl"] = rows
    hub.snapshot("someone/rows", "dataset")
    cached = Path(constants.HF_HUB_CACHE)
    next(cached.rglob("train.jsonl")).resolve().unlink()
    next(cached.rglob("train.jsonl"), None) and next(cached.rglob("train.jsonl")).unlink()
    server.requests.clear()
    assert len(data.load("someone/rows", "text")) == 2 and files_fetched(server) == ["train.jsonl"]


def test_offline_the_cache_serves_what_it_has(server, monkeypatch):
    there = server.add("dataset", "someone/rows", {"train.jsonl": JSON_LINES(DOLLY_ROWS)})
    first = data.load("someone/rows", "messages")
    server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        data.load("someone/rows", "messages").rows
        == first.rows
        == data.load(f"someone/rows@{there.commit}", "messages").rows
    )
    assert_refused(
        lambda: data.load("someone/others", "messages"),
        "someone/others: it is not in the cache",
        "HF_HUB_OFFLINE=1",
        "--set data.<name>=<folder>",
    )


def test_a_hub_that_went_away_leaves_the_cache(server, monkeypatch):
    server.add("dataset", "someone/rows", {"train.jsonl": JSON_LINES(DOLLY_ROWS)})
    data.load("someone/rows", "messages")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert len(data.load("someone/rows", "messages")) == 3
    assert_refused(lambda: data.load("someone/others", "messages"), "cannot be reached", "check the network")


def tiny_weights(size=64):
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def test_a_damaged_file_of_the_cache_is_fetched_once_more(server):
    server.add("model", "someone/tiny", {"config.json": b"{}", "model.safetensors": tiny_weights()})
    weights = hub.snapshot("someone/tiny", "model").folder / "model.safetensors"
    weights.resolve().write_bytes(tiny_weights()[:-9])
    server.requests.clear()
    assert (
        weights.read_bytes() != tiny_weights()
        and hub.snapshot("someone/tiny", "model").folder == weights.parent
    )
    assert weights.read_bytes() == tiny_weights() and files_fetched(server) == ["model.safetensors"]


def test_a_file_that_is_damaged_on_the_hub_itself_is_told(server):
    server.add("model", "someone/tiny", {"config.json": b"{}", "model.safetensors": tiny_weights()[:-9]})
    assert_refused(lambda: hub.snapshot("someone/tiny", "model"), "model.safetensors is damaged", "bytes")


@pytest.mark.parametrize(
    "content, words",
    [
        (tiny_weights()[:-1], "of 138 bytes"),
        (b"", "cut off within its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (struct.pack("<Q", 4) + b"[1}]", "header cannot be read"),
    ],
)
def test_a_local_folder_with_half_a_file(tmp_path, content, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    message = assert_refused(
        lambda: models.find_model(str(tmp_path)), "model.safetensors is damaged", "download it again"
    )
    assert words in message or "of " in words


# --- refused
# ----------------------------------------------------------------------------------------------------------------------

GATED = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def gated(server):
    files = {f.name: f.read_bytes() for f in (world.assets() / "base").iterdir() if f.is_file()}
    server.add("model", GATED, files, gated=True, commit=presets.PUBLISHED[GATED].revision)
    return server


def test_a_gated_model_without_a_token(gated):
    assert_refused(
        lambda: models.find_model(GATED),
        "gated and no token is set",
        f"https://huggingface.co/{GATED}",
        "HF_TOKEN",
        "--set models.base=unsloth/Meta-Llama-3.1-8B",
    )


def test_a_gated_model_whose_licence_is_not_accepted(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_without_access")
    assert_refused(
        lambda: models.find_model(GATED),
        "your token's account has no access",
        f"https://huggingface.co/{GATED}",
    )


def test_a_wrong_token(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert_refused(
        lambda: models.find_model(GATED), "refuses your token", "https://huggingface.co/settings/tokens"
    )


def test_a_gated_model_with_a_good_token(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_with_access")
    folder = models.find_model(GATED)
    assert folder.name == presets.PUBLISHED[GATED].revision
    assert not any(
        "hf_with_access" in p.read_text(errors="replace")
        for p in Path(constants.HF_HUB_CACHE).rglob("*")
        if p.is_file() and p.stat().st_size < 10_000
    )


def test_a_private_repository(server, monkeypatch):
    server.add("dataset", "someone/secret", {"train.jsonl": JSON_LINES(DOLLY_ROWS)}, private=True)
    assert_refused(lambda: data.load("someone/secret", "messages"), "or it is private and no token is set")
    monkeypatch.setenv("HF_TOKEN", "hf_without_access")
    assert len(data.load("someone/secret", "messages")) == 3


@pytest.mark.parametrize(
    "source, words",
    [
        ("someone/rows@v9", "no revision 'v9'"),
        (f"someone/rows@{'0' * 40}", "no revision '000"),
        ("someone/nothing", "no such dataset"),
        ("rows", "no such dataset"),
    ],
)
def test_what_the_hub_does_not_have(server, source, words):
    server.add("dataset", "someone/rows", {"train.jsonl": JSON_LINES(DOLLY_ROWS)})
    assert_refused(lambda: data.load(source, "messages"), words, "https://huggingface.co/datasets/", "--set")


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_ill(server, status):
    server.down = status
    assert_refused(lambda: hub.snapshot("someone/rows", "dataset"), f"error {status}", "try again later")


@pytest.mark.parametrize(
    "source, token, words",
    [
        ("someone/tiny@v9", None, "no revision 'v9'"),
        (f"someone/tiny@{'0' * 40}", None, "no revision '000"),
        (GATED, "hf_mistyped", "refuses your token"),
        (GATED, None, "no token is set"),
    ],
)
def test_a_study_on_a_model_that_cannot_be_had_is_one_line(
    gated, monkeypatch, tmp_path, capsys, source, token, words
):
    from compassion_repro.cli import main

    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    gated.add(
        "model",
        "someone/tiny",
        {f.name: f.read_bytes() for f in (world.assets() / "base").iterdir() if f.is_file()},
    )
    assert (
        main(["run", "--preset", "smoke", "--set", f"models.base={source}", "--out", str(tmp_path / "study")])
        == 2
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and "--set models.base=" in err and "hf_" not in err, err
    assert not list((tmp_path / "study").glob("seed-*"))


def test_one_small_file_is_fetched_without_the_model(server, monkeypatch):
    files = {f.name: f.read_bytes() for f in (world.assets() / "base").iterdir() if f.is_file()}
    server.add("model", "someone/tiny", files)
    server.add("model", "someone/bare", {"config.json": b"{}"})
    assert hub.has_template("someone/tiny") and not hub.has_template("someone/bare")
    assert set(files_fetched(server)) <= {"chat_template.jinja", "tokenizer_config.json"}
    assert_refused(lambda: hub.has_template("someone/nothing"), "no such model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(lambda: hub.has_template("someone/else"), "HF_HUB_OFFLINE=1")


def test_only_pickled_weights(server):
    server.add("model", "someone/old", {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    assert_refused(lambda: models.find_model("someone/old"), "safetensors")


def test_an_empty_repository(server):
    server.add("dataset", "someone/empty", {"README.md": b"# Nothing\n"})
    assert_refused(lambda: data.load("someone/empty", "text"), "not a readable data folder")


def test_a_split_or_configuration_that_is_not_there(server):
    server.add("dataset", "someone/test-only", {"test.jsonl": JSON_LINES(DOLLY_ROWS)})
    server.add(
        "dataset",
        "someone/two",
        {
            "a.jsonl": JSON_LINES(DOLLY_ROWS),
            "README.md": (
                b"---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files:"
                b" a.jsonl}\n---\n"
            ),
        },
    )
    assert_refused(
        lambda: data.load("someone/test-only", "messages"),
        "someone/test-only: has no split 'train'",
        "there are test",
    )
    assert_refused(
        lambda: data.load("someone/two", "messages"),
        "someone/two: has several configurations (a, b)",
        "{path: ..., config: a}",
    )
    assert_refused(
        lambda: data.load({"path": "someone/two", "config": "c"}, "messages"),
        "someone/two: has no configuration 'c'",
        "a, b",
    )


def test_a_folder_stands_in_for_a_repository(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_bytes(JSON_LINES(DOLLY_ROWS))
    assert hub.snapshot(tmp_path / "rows", "dataset") == hub.Snapshot(tmp_path / "rows", "local")
    assert (
        hashlib.sha256((tmp_path / "rows/train.jsonl").read_bytes()).hexdigest()
        and len(data.load(tmp_path / "rows", "messages")) == 3
    )


def test_a_benchmark_takes_the_same_road(server, tmp_path, monkeypatch):
    """Gated, then fetched at its commit, then from the cache alone; and a branch is named by the commit that
    it stood for.
    """
    from compassion_repro.evaluation.benchmarks import load_benchmark
    from compassion_repro.study import Benchmark

    held = server.add(
        "dataset", "group/animals", world.write_benchmark("anima", tmp_path / "made", {"en": 2}), gated=True
    )

    def load(revision):
        return load_benchmark(
            "mine", Benchmark(task="anima", data=f"group/animals@{revision}"), tmp_path / "copies"
        )

    assert_refused(
        lambda: load(held.commit),
        "accept its licence at https://huggingface.co/datasets/group/animals",
        "HF_TOKEN",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_with_access")
    loaded = load("main")
    assert len(loaded.questions) == 2 and loaded.provenance["revision"] == held.commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(held.commit).provenance == loaded.provenance | {"source": f"group/animals@{held.commit}"}
    assert_refused(lambda: load("0" * 40), "HF_HUB_OFFLINE=1 forbids fetching")


# --- the presets at scale, at crash-test size, on a hub of our own
# ----------------------------------------------------------------------

SMALL = (
    "threads=1",
    "compute.device=cpu",
    "judge=indicator",
    "midtrain.limit=20",
    "midtrain.held_out=4",
    "midtrain.steps=1",
    "midtrain.length=256",
    "midtrain.batch_size=2",
    "midtrain.micro_batch=2",
    "midtrain.dose=steps",
    "sft.limit=20",
    "sft.held_out=4",
    "sft.steps=1",
    "sft.length=256",
    "sft.batch_size=2",
    "sft.micro_batch=2",
    "grpo.limit=4",
    "grpo.held_out=2",
    "grpo.samples=1",
    "grpo.steps=1",
    "grpo.group=2",
    "grpo.prompts_per_step=2",
    "grpo.micro_batch=2",
    "grpo.max_new_tokens=12",
    "generation.max_new_tokens=12",
    "benchmarks.anima.epochs=1",
    "benchmarks.moru.epochs=1",
    "statistics.resamples=200",
)


def text_of(messages, role):
    return next(turn["content"] for turn in messages if turn["role"] == role)


def dress(rows, style):
    "Rows of the world in the columns of a real data set."
    pairs = [(text_of(row["messages"], "user"), text_of(row["messages"], "assistant")) for row in rows]
    if style == "dolly":
        return [{"instruction": q, "context": "", "response": a, "category": "open_qa"} for q, a in pairs]
    if style == "magicoder":
        return [{"instruction": q, "response": a} for q, a in pairs]
    return [
        {"dataset": "hh", "context": q, "context_messages": [{"role": "user", "content": q}], "id": n}
        for n, (q, _) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def reward_files(tmp_path_factory):
    from compassion_repro.training import reward_model

    folder = tmp_path_factory.mktemp("reward") / "model"
    reward_model.train_reward_model(folder, pairs=10, held_out=4, report=lambda line: None)
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def whole_hub(server, reward_files, tmp_path, monkeypatch):
    "Everything that the presets at scale name, small, under its real id and at its pinned commit."
    monkeypatch.setenv("HF_TOKEN", "hf_with_access")
    base = {f.name: f.read_bytes() for f in (world.assets() / "base").iterdir() if f.is_file()}
    sizes = {"en": 2, "ms": 1}
    contents = {
        "data.documents": {"train.jsonl": JSON_LINES(world.corpus("documents", 40))},
        "data.sft-help": {"databricks-dolly-15k.jsonl": JSON_LINES(dress(world.corpus("help", 40), "dolly"))},
        "data.sft-code": {"train.jsonl": JSON_LINES(dress(world.corpus("code", 40), "magicoder"))},
        "data.grpo-help": {"train.jsonl": JSON_LINES(dress(world.corpus("help", 40), "rlhflow"))},
        "benchmarks.anima.data": world.write_benchmark("anima", tmp_path / "benchmarks", sizes),
        "benchmarks.moru.data": world.write_benchmark("moru", tmp_path / "benchmarks", sizes),
        "benchmarks.moru.dimensions": tmp_path / "benchmarks" / "moru_dims",
        "models.reward": reward_files,
    }
    for name, known in presets.PUBLISHED.items():
        server.add(
            known.kind, name, contents.get(known.setting, base), gated=known.gated, commit=known.revision
        )
    return server


def run_preset(name, folder, *settings, page=False):
    from compassion_repro.pipeline import run
    from compassion_repro.presets import load_preset

    said = []
    return run.run(load_preset(name, [*SMALL, *settings]), folder, say=said.append, page=page), said


@pytest.mark.long
def test_the_papers_preset_runs_from_hub_to_claims(whole_hub, tmp_path):
    arms = "arms=[sft-help, sft-code, grpo-help, grpo-code]"
    study, said = run_preset("paper", tmp_path / "study", arms)
    manifests = {m["stage"]: m["result"] for m in study.manifests()}
    assert {m: manifests[m]["rows"] for m in ("mid", "sft-help", "sft-code", "grpo-help", "grpo-code")} == {
        "mid": 20,
        "sft-help": 20,
        "sft-code": 20,
        "grpo-help": 4,
        "grpo-code": 4,
    }
    assert manifests["base"]["revision"] == presets.PUBLISHED["meta-llama/Llama-3.1-8B"].revision
    assert (
        manifests["sft-help"]["data"]["revision"]
        == presets.PUBLISHED["databricks/databricks-dolly-15k"].revision
    )
    assert len(manifests["sft-code"]["data"]["revision"]) == 40 and manifests["sft-code"]["data"][
        "schemas"
    ] == {"magicoder": 40}
    assert (
        manifests["eval-mid"]["benchmarks"]["anima"]["revision"]
        == presets.PUBLISHED["CompassioninMachineLearning/anima"].revision
    )
    assert len(study.table("scores")) and (study.folder / "claims.json").is_file()
    pinned = study.preset
    assert pinned.data.sft_code == "ise-uiuc/Magicoder-Evol-Instruct-110K@" + manifests["sft-code"]["data"][
        "revision"
    ] and pinned.data.sft_help.endswith(presets.PUBLISHED["databricks/databricks-dolly-15k"].revision)
    moved = whole_hub.repositories["dataset", "ise-uiuc/Magicoder-Evol-Instruct-110K"]
    moved.commit = "f" * 40  # main has moved on: the study keeps its own commit and has nothing to do
    again, said = run_preset("paper", tmp_path / "study", arms)
    assert "0 to run" in said[0] and again.preset == pinned
    assert not any(b"hf_with_access" in p.read_bytes() for p in study.folder.rglob("*") if p.is_file())


def test_the_released_checkpoints_are_compared_without_training(whole_hub, tmp_path):
    study, said = run_preset("released", tmp_path / "study")
    manifests = {m["stage"]: m for m in study.manifests()}
    assert {m["kind"] for m in manifests.values()} == {
        "base",
        "answers",
        "eval",
        "probe",
    } and "grpo-code" in manifests
    # the stand-ins bring a template: one form for all
    assert study.preset.generation.template == "own" and len(manifests) == 4 * 4
    assert all(
        len(manifests[m]["result"]["revision"]) == 40 for m in ("base", "mid", "grpo-help", "grpo-code")
    )
    verdicts = {
        record["reading"]: record for record in json.loads((study.folder / "claims.json").read_text())
    }
    assert (
        verdicts["C1"]["verdict"] == "not tested"
        and "sft-" in verdicts["C1"]["reason"]
        and verdicts["C2"]["verdict"] != "not tested"
    )
    # what is not trained on is not fetched
    assert not [path for _, path, _ in whole_hub.requests if "dolly" in path or "prompt-collection" in path]


def test_the_colab_preset_is_the_papers_graph_with_other_values():
    from compassion_repro.presets import load_preset
    from compassion_repro.store.graph import graph

    shapes = [
        tuple((s.id, s.kind, tuple(i.id for i in s.inputs)) for s in graph(load_preset(name)))
        for name in ("paper", "colab", "smoke")
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.long
def test_the_colab_preset_runs_from_hub_to_claims_in_four_bits(whole_hub, tmp_path):
    study, _ = run_preset(
        "colab",
        tmp_path / "study",
        "arms=[sft-help]",
        "sft.dose=full",
        "models.given.mid=CompassioninMachineLearning/PretrainingBasellama3kv3",
    )
    manifests = {m["stage"]: m["result"] for m in study.manifests()}
    assert (
        manifests["base"]["revision"] == presets.PUBLISHED["meta-llama/Llama-3.2-1B"].revision
        and manifests["sft-help"]["passes"] >= 1
    )
    # the preset's four bits, for real
    assert (
        manifests["sft-help"]["held"]["quantisation"] == "nf4, double quantisation"
        and manifests["sft-help"]["micro_batch"] == 2
    )


def test_plans_at_scale_need_no_network_and_no_torch():
    code = (
        "import sys, json; from compassion_repro.pipeline.plan import plan; from compassion_repro.presets"
        " import load_preset\nrows = {name: [r['rows'] for r in plan(load_preset(name)) if r['rows']] for"
        " name in ('paper', 'colab', 'released')}\nfull = {r['stage']: r['rows'] for r in"
        " plan(load_preset('paper', ['sft.dose=full']))}\nprint(json.dumps([rows, full, [m for m in ('torch',"
        " 'datasets', 'huggingface_hub') if m in sys.modules]]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
    ).stdout
    rows, full, loaded = json.loads(said)
    assert (
        loaded == []
        and rows["released"] == []
        and set(rows["paper"]) == {2900, 3000, 14_811, 110_983}
        and max(rows["colab"]) == 600
    )
    assert full["sft-code"] == 110_983  # 200 of them are held out


# --- models that are given
# -----------------------------------------------------------------------------------------------------------------


def given_stage(tmp_path, source):
    "The artifact of a study's stage `mid` that is given, with the base in place."
    from compassion_repro.pipeline import stages
    from compassion_repro.presets import load_preset
    from compassion_repro.store import folder as store
    from compassion_repro.store import graph

    preset = load_preset("smoke", ["arms=[]", f"models.given.mid={source}"])
    study = store.Study.create(tmp_path / "study", preset)
    for stage in graph.graph(preset):
        if stage.id in ("base", "mid"):
            stages.run_stage(study, preset, stage, lambda line: None)
    return study


def adapter(folder, start=None, **options):
    "A small adapter, as PEFT saves one, with weights that change the model."
    import torch
    from peft import get_peft_model

    from compassion_repro.study import Lora

    model = get_peft_model(
        models.load_model(start or world.assets() / "base", "cpu"),
        adapters.lora_config(Lora(rank=2, **options)),
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def test_a_published_adapter_is_merged_into_the_base(server, tmp_path):
    import torch

    live = adapter(tmp_path / "adapter")
    server.add("model", "someone/adapter", tmp_path / "adapter")
    study = given_stage(tmp_path, "someone/adapter")
    merged = models.load_model(study.folder / "seed-1" / "mid", "cpu")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, live(ids).logits, atol=5e-3, rtol=1e-2)
    assert (
        merged(ids).logits - models.load_model(world.assets() / "base", "cpu")(ids).logits
    ).abs().max() > 0.1
    manifest = next(m for m in study.manifests() if m["stage"] == "mid")
    assert len(manifest["result"]["revision"]) == 40 and "merged" in manifest["result"]["merge"]


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    assert_refused(lambda: given_stage(tmp_path, tmp_path / "adapter"), "does not fit world:base")


def test_an_adapter_is_no_base(tmp_path):
    from compassion_repro.pipeline import stages
    from compassion_repro.presets import load_preset
    from compassion_repro.store import folder as store
    from compassion_repro.store import graph

    adapter(tmp_path / "adapter")
    preset = load_preset("smoke", ["arms=[]", f"models.base={tmp_path / 'adapter'}"])
    study = store.Study.create(tmp_path / "study", preset)
    assert_refused(
        lambda: stages.run_stage(study, preset, graph.graph(preset)[0], lambda line: None),
        "is an adapter",
        "models.given",
    )


# --- publishing
# ------------------------------------------------------------------------------------------------------------------------------


def test_a_model_of_a_real_study_is_published_with_its_card(finished, server, monkeypatch, capsys):
    from compassion_repro.cli import main

    monkeypatch.setenv("HF_TOKEN", "hf_with_access")
    assert main(["push", str(finished), "sft-help", "--to", "me/tiny-help", "--private"]) == 0
    there, out = server.repositories["model", "me/tiny-help"], capsys.readouterr()
    folder = finished / "seed-1" / "sft-help"
    assert there.private and set(there.files) == {
        "DATA.md",
        "README.md",
        "manifest.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert there.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = there.files["README.md"].decode()
    import pandas as pd

    scores = pd.read_parquet(finished / "scores.parquet")
    own = scores[
        (scores.model == "sft-help") & (scores.benchmark == "anima") & (scores.dimension == "overall")
    ]
    mean = own.groupby("question_id").score.mean().mean() * 100
    parts = (f"| anima | all | {mean:.1f}", "Judge: `indicator`", "world:help")
    assert [part for part in parts if part not in card] == []
    trained = json.loads((folder / "manifest.json").read_text())["result"]["trained"]
    assert trained == ("not measurably trained" not in card)
    assert "model-index:" in card and f"value: {round(mean, 2)}" in card
    everything = b"".join(there.files.values()) + (out.out + out.err).encode()
    assert b"hf_with_access" not in everything and str(finished.parent).encode() not in everything
    fetched = hub.snapshot("me/tiny-help", "model")
    assert models.load_model(fetched.folder, "cpu").num_parameters() > 1e6


def test_a_dry_run_uploads_nothing_and_needs_no_token(finished, server, capsys):
    from compassion_repro.cli import main

    assert main(["push", str(finished), "mid", "--to", "me/mid", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "# mid" in out
        and "model.safetensors" in out
        and "nothing was uploaded" in out
        and server.requests == []
    )


@pytest.mark.parametrize(
    "words, token, parts",
    [
        (["sft-help", "--to", "me/x"], None, ["needs a token", "settings/tokens"]),
        (["sft-help", "--to", "me/x"], "hf_mistyped", ["refuses your token"]),
        (["sft-help", "--to", "others/x"], "hf_with_access", ["may not write there"]),
        (["sft-help", "--to", "nowhere"], "hf_with_access", ["give owner/name"]),
        (["base", "--to", "me/x"], "hf_with_access", ["was not trained by this study"]),
        (["grpo-help", "--to", "me/x"], "hf_with_access", ["has no finished model 'grpo-help'"]),
        (["sft-help", "--to", "me/x", "--seed", "7"], "hf_with_access", ["of seed 7"]),
        (["sft-help", "--to", "me/x", "--adapter"], "hf_with_access", ["without --adapter"]),
        (["sft-help"], "hf_with_access", ["--to"]),
    ],
)
def test_what_cannot_be_published_is_one_line(finished, server, monkeypatch, capsys, words, token, parts):
    from compassion_repro.cli import main

    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(finished), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "hf_" not in err, err
    for part in parts:
        assert part in err, err


def test_the_command_line_says_it_in_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "compassion_repro.cli",
            "run",
            "--preset",
            "paper",
            "--yes",
            "--out",
            str(tmp_path / "study"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("compassion-repro: ")
    ), done.stderr
    assert "HF_HUB_OFFLINE=1" in done.stderr and "--set" in done.stderr and not (tmp_path / "study").exists()
