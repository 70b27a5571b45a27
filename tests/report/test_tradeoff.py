"""The command `tradeoff` on studies that have lost a part."""

import json

import pytest

from compassion_repro import cli
from compassion_repro.presets import load_preset
from compassion_repro.stats.claim_table import ClaimTable
from compassion_repro.stats.scores import draw_scores
from compassion_repro.store import results
from compassion_repro.store.folder import Study


def stages(seed):
    "Manifests of an arm and of its measures."
    trained = {"gain": 0.4, "gain_low": 0.3, "gain_high": 0.5, "loss_after": 1.0, "steps": 40}
    parts = (trained | {"rows": 80, "passes": 1.0, "loss_tokens": 4000}, {"kl_mean": 0.4})
    return [{"model": "sft-help", "seed": seed, "kind": "sft", "result": part} for part in parts]


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A drawn study of three seeds; gives its folder and the list of its manifests."
    preset, manifests = (
        load_preset("smoke", ["arms=[sft-help]"]),
        [m for seed in range(3) for m in stages(seed)],
    )
    Study.create(tmp_path / "drawn", preset, lambda line: None)
    files = results.StudyFiles("drawn", preset, draw_scores(seeds=3), ClaimTable(records=[]), manifests)
    monkeypatch.setattr(results, "read_study_files", lambda folder: files)
    return str(tmp_path / "drawn"), manifests


def test_a_seed_without_manifests_is_named(study, capsys):
    folder, manifests = study
    assert cli.main(["tradeoff", folder, "--json"]) == 0
    whole = capsys.readouterr()
    assert whole.err == "" and json.loads(whole.out)["arms"][0]["model"] == "sft-help"
    manifests[:] = [m for m in manifests if m["seed"] != 2]
    assert cli.main(["tradeoff", folder, "--json"]) == 0
    assert capsys.readouterr().err.startswith("note: no manifest is left of seed 2: gains and distances")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_nothing_to_weigh_is_one_line(study, words, capsys):
    folder, manifests = study
    manifests.clear()
    assert cli.main(["tradeoff", folder, *words]) == 2
    said = capsys.readouterr()
    assert "nothing to weigh" in said.err and said.out == ""
