"""A study's rules are registered before its first stage, and a later change is shown at every verdict."""

import pytest

from compassion_repro.core.errors import InputError
from compassion_repro.paper import CLAIMS, FAMILIES
from compassion_repro.pipeline import run
from compassion_repro.presets import load_preset, with_settings
from compassion_repro.stats.general import study_claims
from compassion_repro.stats.scores import draw_scores
from compassion_repro.store.folder import Study
from compassion_repro.store.registration import REGISTRATION, read_registration, register

TINY = load_preset("tiny", ["statistics.resamples=200"])


def quiet(line):
    pass


@pytest.fixture
def judged(tmp_path) -> Study:
    "A study with drawn scores of one seed, whose first stage has left something."
    study = Study.create(tmp_path / "mine", TINY, quiet, seeds=1)
    draw_scores(seeds=1).assign(study="mine").to_parquet(study.folder / "scores.parquet")
    run.write_json_recorded(study.folder, run.TRAINING, dict.fromkeys(TINY.trained, {"trained": True}))
    (study.folder / "seed-1" / "base").mkdir(parents=True)
    return study


def test_rules_are_there_before_the_first_stage(tmp_path):
    study = Study.create(tmp_path / "mine", TINY, quiet, seeds=5)
    first = read_registration(study.folder)
    assert (first.analysis["seeds"], first.claims) == (5, study_claims(TINY)) and not study.begun
    # nothing has run, so nothing has been seen: the rules may be written anew
    Study.create(study.folder, with_settings(TINY, ["statistics.margin=3"]), quiet, seeds=5)
    assert read_registration(study.folder).analysis["statistics"]["margin"] == 3
    assert run.changed_rules(study, study.preset, 5) == ""


def test_a_later_change_is_allowed_and_shown_at_every_verdict(judged, capsys):
    table, _ = run.judge_study(judged)
    assert {tuple(record.changed) for record in table.records} == {()}
    assert "before the first stage." in table.caption()
    first = read_registration(judged.folder)
    other = with_settings(TINY, ["statistics.margin=3"])
    changed = Study.create(judged.folder, other, quiet, seeds=2)
    assert read_registration(judged.folder) == first
    line = run.changed_rules(changed, other, 2)
    assert "statistics.margin: 5.0 registered, 3.0 now; seeds: 1 registered, 2 now" in line
    assert "--registered" in line and "\n" not in line
    later, _ = run.judge_study(changed)
    assert later["C6-SFT"].margin == 3
    for record in later.records:
        assert record.changed == ["statistics.margin: 5.0 registered, 3.0 now"]
    assert all("rules changed since they were registered" in row[-1] for row in later.rows())
    by_first, _ = run.judge_study(changed, registered=True)
    assert by_first["C6-SFT"].margin == 5 and not by_first["C6-SFT"].changed


def test_a_study_registered_before_there_were_general_verdicts_goes_on(judged):
    now, _ = run.judge_study(judged)
    first, n = read_registration(judged.folder).analysis, len(CLAIMS)
    older = first | {"claims": first["claims"][:n], "families": {k: first["families"][k] for k in FAMILIES}}
    for claim in older["claims"]:
        del claim["everywhere"]
    (judged.folder / REGISTRATION).unlink()
    register(judged.folder, older)
    table, _ = run.judge_study(judged)
    when = {"registered": table.records[0].registered}
    before = [record.with_(**when) for record in now.of_paper.records]
    assert table.of_paper.records == before  # to the last digit
    assert all(record.changed for record in table.general.records)
    assert "reading G1-sft-help added" in table["G1-sft-help-anima"].changed
    assert "family general, anima added" in run.changed_rules(judged, judged.preset, 1)
    by_first, _ = run.judge_study(judged, registered=True)
    assert not by_first.general.records and len(by_first) == len(table.of_paper)


def test_a_study_without_a_registration_goes_on(judged):
    (judged.folder / REGISTRATION).unlink()
    again = Study.create(judged.folder, TINY, quiet)
    assert not (again.folder / REGISTRATION).exists()
    assert run.changed_rules(again, TINY, 1) == ""
    table, _ = run.judge_study(again)
    assert "not registered" in table.caption()
    with pytest.raises(InputError, match="is not registered .* by the rules of today"):
        run.judge_study(again, registered=True)


def test_an_edited_registration_counts_as_none(judged):
    file = judged.folder / REGISTRATION
    file.write_text(file.read_text(encoding="utf-8").replace("margin: 5.0", "margin: 9.0"), encoding="utf-8")
    assert "edited by hand" in run.changed_rules(judged, TINY, 1)
    assert "not registered" in run.judge_study(judged)[0].caption()
    with pytest.raises(InputError, match="damaged or was edited by hand"):
        run.judge_study(judged, registered=True)


def test_seeds_by_number_are_registered_as_such(tmp_path):
    study = Study.create(tmp_path / "later", TINY, quiet, seeds=range(4, 7))
    assert read_registration(study.folder).analysis["seeds"] == [4, 5, 6]
    draw_scores(seeds=3).assign(study="later", seed=lambda rows: rows["seed"] + 4).to_parquet(
        study.folder / "scores.parquet"
    )
    run.write_json_recorded(study.folder, run.TRAINING, dict.fromkeys(TINY.trained, {"trained": True}))
    (study.folder / "seed-4" / "base").mkdir(parents=True)
    assert {stage.seed for stage in study.stages(TINY)} == {4}
    assert {stage.seed for stage in study.stages(TINY, at_least=range(4, 7))} == {4, 5, 6}
    table, _ = run.judge_study(study)
    assert {tuple(record.changed) for record in table.records} == {()}
    assert "seeds changed" in run.changed_rules(study, TINY, 7)
