"""Statistics on longer cases: frames as the study writes them, bad input, claims from end to end."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from compassion_repro.core.errors import InputError
from compassion_repro.paper import Cell, Reading, readings
from compassion_repro.presets import load_preset
from compassion_repro.report import figures, forest, looks, tables
from compassion_repro.stats import (
    claims,
    estimates,
    inference,
    verdicts,
)
from compassion_repro.stats import (
    scores as score_frames,
)
from compassion_repro.stats import (
    scores as scores_module,
)
from compassion_repro.store.folder import Study
from compassion_repro.study import Statistics

QUICK = Statistics(resamples=1000)
TINY = load_preset("tiny", ["statistics.resamples=500"])
LEVELS = {
    "base": 0.05,
    "mid": 0.5,
    "sft-help": 0.2,
    "sft-code": 0.48,
    "sft-help@base": 0.05,
    "sft-code@base": 0.06,
}


def frame(levels=LEVELS, seeds=1, epochs=5, items=24, translated=12, random_seed=0, study="drawn"):
    """Scores of ANIMA (separate questions a language) and MORU (half of the items translated), with a
    probability of a point a model.
    """
    generator, rows = np.random.default_rng(random_seed), []
    hard = generator.normal(0, 0.1, size=(2, 2 * items))
    for seed in range(seeds):
        for model, level in levels.items():
            for number, benchmark in enumerate(("anima", "moru")):
                for index in range(items + translated):
                    language = "en" if index < items else "ms"
                    item = f"q{index % items}" if benchmark == "moru" else f"q{index}-{language}"
                    chance = np.clip(level + hard[number, index % items], 0.01, 0.99)
                    for epoch in range(1, epochs + 1):
                        rows.append(
                            (
                                model,
                                seed,
                                benchmark,
                                language,
                                item,
                                f"{item}_{language}",
                                epoch,
                                "overall",
                                generator.binomial(4, chance) / 4,
                            )
                        )
    columns = [
        "model",
        "seed",
        "benchmark",
        "language",
        "item_id",
        "question_id",
        "epoch",
        "dimension",
        "score",
    ]
    return pd.DataFrame(rows, columns=columns).assign(study=study, judge="indicator", judge_valid=True)


@pytest.fixture(scope="module")
def scores():
    return frame()


def difference(high, low, languages="all", benchmark="anima", kind="superiority"):
    return Reading(
        "X", f"{high} − {low}", kind, benchmark, (Cell(high, 1, languages), Cell(low, -1, languages))
    )


def test_claims_end_to_end(scores, tmp_path):
    table = claims.judge_claims(scores, {}, TINY)
    assert [table[name].verdict for name in ("C1", "C0-SFT", "C3")] == ["holds for these checkpoints"] * 3
    assert {table[name].verdict for name in ("C2", "C0-GRPO", "C6-GRPO", "C7", "C8")} == {"not tested"}
    assert set(record.verdict for record in table.records) <= set(verdicts.VERDICTS)
    assert all(record.scope == TINY.scope and record.judge == "indicator" for record in table.records)
    (tmp_path / "claims.json").write_text(table.to_json(), encoding="utf-8")
    assert claims.read_claims(tmp_path / "claims.json") == table
    assert all(isinstance(record, dict) and record["verdict"] for record in json.loads(table.to_json()))
    assert table._repr_markdown_().count("\n|") >= len(table)
    assert table.rich_table().row_count == len(table)


def test_the_papers_direction_is_no_input(scores):
    names = {
        "sft-code": "sft-help",
        "sft-help": "sft-code",
        "sft-code@base": "sft-help@base",
        "sft-help@base": "sft-code@base",
    }
    table, turned = (
        claims.judge_claims(part, {}, TINY)
        for part in (scores, scores.assign(model=scores["model"].replace(names)))
    )
    for name in ("C0-SFT", "C1", "C3"):
        assert turned[name].estimate == pytest.approx(-table[name].estimate)
        assert (table[name].low, table[name].high) == pytest.approx((-turned[name].high, -turned[name].low))
        assert turned[name].verdict == "fails for these checkpoints"


def test_order_of_rows_does_not_matter(scores):
    shuffled = scores.sample(frac=1, random_state=3)
    assert (
        claims.judge_claims(shuffled, {}, TINY).to_json() == claims.judge_claims(scores, {}, TINY).to_json()
    )
    pd.testing.assert_frame_equal(
        estimates.model_means(shuffled, settings=QUICK), estimates.model_means(scores, settings=QUICK)
    )


def test_two_equal_models_differ_by_nothing(scores):
    twins = pd.concat([scores, scores[scores["model"] == "mid"].assign(model="mid-control")])
    result = estimates.contrast(twins, difference("mid", "mid-control"), QUICK)
    assert (result.estimate, result.p, result.cohens_d) == (0, 1, None)
    # all alike: what 36 questions leave open
    assert result.low == pytest.approx(-result.high) and 5 < result.high < 30
    assert verdicts.verdict_of("superiority", result.interval, 5)[0] == "inconclusive"
    one = twins[twins["question_id"] == "q1-en_en"]
    single = estimates.contrast(one, difference("mid", "mid-control"), QUICK)
    assert (single.questions, single.low, single.p, single.smallest_margin, single.detectable) == (
        1,
        None,
        None,
        None,
        None,
    )


def test_seeds_are_paired_and_three_make_the_procedure():
    three = frame(seeds=3)
    assert estimates.contrast(three, difference("sft-code", "sft-help"), QUICK).level == "the procedure"
    less = three[~((three["model"] == "sft-help") & (three["seed"] == 2))]
    result = estimates.contrast(less, difference("sft-code", "sft-help"), QUICK)
    assert (result.seeds, result.level, sorted(result.per_seed)) == (2, "these checkpoints", ["0", "1"])
    apart = three[(three["model"] != "sft-help") | (three["seed"] == 2)]
    apart = apart[(apart["model"] != "sft-code") | (apart["seed"] < 2)]
    with pytest.raises(InputError, match="no seeds in common"):
        estimates.contrast(apart, difference("sft-code", "sft-help"), QUICK)
    table = claims.judge_claims(apart, {}, TINY)
    assert table["C1"].verdict == "not tested" and "no seeds in common" in table["C1"].reason


def test_nulls_are_left_out_and_counted(scores):
    gone = scores.copy()
    gone.loc[(gone["model"] == "mid") & (gone["question_id"] == "q1-en_en"), "score"] = None
    gone.loc[
        (gone["model"] == "mid") & (gone["question_id"] == "q2-en_en") & (gone["epoch"] == 1), "score"
    ] = None
    means = (
        estimates.model_means(gone, settings=QUICK).set_index(["benchmark", "model"]).loc[("anima", "mid")]
    )
    assert (means["nulls"], means["questions"]) == (6, 35)
    result = estimates.contrast(gone, difference("sft-code", "mid"), QUICK)
    assert (result.questions, result.dropped) == (35, 1)


def test_a_whole_benchmark_unscored(scores):
    mute = scores.assign(score=scores["score"].where(scores["benchmark"] != "moru"))
    table = claims.judge_claims(mute, {}, TINY)
    assert table["C3"].verdict == "not tested" and "no question is scored" in table["C3"].reason
    assert set(estimates.model_means(mute, settings=QUICK)["benchmark"]) == {"anima"}
    with pytest.raises(InputError, match="no scored questions"):
        estimates.model_means(scores.assign(score=np.nan), settings=QUICK)


def test_null_claims_need_something_to_lose(scores):
    kept = frame({**LEVELS, "sft-code": 0.5}, items=120, translated=60, random_seed=4)
    assert claims.judge_claims(kept, {}, TINY)["C6-SFT"].verdict == "holds for these checkpoints"
    lost = claims.judge_claims(frame({**LEVELS, "sft-code": 0.1}), {}, TINY)["C6-SFT"]
    assert lost.verdict == "fails for these checkpoints"
    assert lost.sensitivity == dict.fromkeys(("3", "10"), "fails for these checkpoints")
    floor = claims.judge_claims(frame({model: 0.05 for model in LEVELS}), {}, TINY)
    assert {floor[name].verdict for name in ("C4a", "C4b", "C6-SFT")} == {"not testable"}
    headless = claims.judge_claims(scores[scores["model"] != "base"], {}, TINY)
    assert headless["C6-SFT"].verdict == "not testable" and "base" in headless["C6-SFT"].reason


def test_supported_needs_three_training_seeds():
    words = {}
    for seeds in (1, 2, 3):
        table = claims.judge_claims(frame(seeds=seeds), {}, TINY)
        words[seeds] = table["C1"].verdict
        assert ("three" in table.caption()) == (seeds < 3)
        hollow = forest.claim_rows(table).set_index("reading")["level"]
        assert hollow["C1"] == ("the procedure" if seeds == 3 else "these checkpoints")
    assert words == {1: "holds for these checkpoints", 2: "holds for these checkpoints", 3: "supported"}


def test_checks_get_no_verdict_and_are_not_counted(scores):
    table = claims.judge_claims(scores, {}, TINY)
    checks = [r for r in table.records if r.estimate is not None and r.family is None]
    assert {r.reading for r in checks} == {"C5a-standardised", "C5b-standardised"} or not checks
    unadjusted = [r for r in table.records if r.verdict not in ("no verdict", "not tested", "not testable")]
    assert unadjusted and all(r.corrected for r in unadjusted)
    counts = tables.verdict_counts(table)
    assert "no verdict" not in counts
    assert sum(counts.values()) == len(table) - sum(r.verdict == "no verdict" for r in table.records)


def test_a_difference_needs_something_that_midtraining_added():
    flat = frame({**LEVELS, "mid": LEVELS["base"]}, random_seed=5)
    found = claims.judge_claims(flat, {}, TINY)["C1"]
    assert found.verdict == "not testable" and "did not surely add anything" in found.reason


def test_untrained_arms_and_a_judge_that_cannot_read(scores):
    table = claims.judge_claims(
        scores,
        {"sft-help": {"trained": False, "reason": "loss 2.0 -> 2.1"}, "mid": {"trained": True, "reason": ""}},
        TINY,
    )
    assert (
        table["C1"].verdict == "not testable"
        and "sft-help was not trained: loss 2.0 -> 2.1" in table["C1"].reason
    )
    assert table["C6-SFT"].verdict != "not testable"
    blind = claims.judge_claims(scores.assign(judge_valid=False), {}, TINY)
    assert {record.verdict for record in blind.records if record.estimate is not None} == {"not testable"}
    assert (
        "scores mean nothing"
        in figures.plot_scores(scores.assign(judge_valid=False), QUICK).axes[0].get_title()
    )


def test_a_translated_item_is_one_item():
    # the same answers in three languages: three times the questions, not three times the evidence
    one = frame(items=30, translated=0)
    one = one[one["benchmark"] == "moru"]
    three = pd.concat(
        [
            one.assign(language=language, question_id=one["item_id"] + language)
            for language in ("en", "ms", "hi")
        ]
    )
    reading = difference("sft-code", "sft-help", benchmark="moru")
    single, triple = estimates.contrast(one, reading, QUICK), estimates.contrast(three, reading, QUICK)
    assert (triple.questions, triple.items) == (90, 30)
    assert (triple.low, triple.high) == pytest.approx((single.low, single.high))
    apart = estimates.contrast(three.assign(item_id=three["question_id"]), reading, QUICK)
    assert apart.high - apart.low < 0.7 * (triple.high - triple.low)


@pytest.mark.long
def test_interval_covers_through_the_real_path():
    "200 drawn studies through `contrast` itself, en minus other on separate items."
    hits, studies, generator = 0, 200, np.random.default_rng(5)
    reading = Reading(
        "X",
        "",
        "superiority",
        "anima",
        (
            Cell("sft-code", 1, "other"),
            Cell("mid", -1, "other"),
            Cell("mid", 1, "en"),
            Cell("sft-code", -1, "en"),
        ),
    )
    item = [f"{language}{index}" for language, count in (("en", 24), ("ms", 24)) for index in range(count)]
    truth = {("mid", "e"): 0.5, ("mid", "m"): 0.1, ("sft-code", "e"): 0.4, ("sft-code", "m"): 0.2}
    for _ in range(studies):
        common = generator.normal(0, 0.05, len(item))
        rows = [
            dict(
                model=model,
                item_id=i,
                question_id=i,
                language=i[:2],
                score=np.clip(truth[model, i[0]] + shift + generator.normal(0, 0.05), 0, 1),
            )
            for model in ("mid", "sft-code")
            for i, shift in zip(item, common)
        ]
        result = estimates.contrast(
            pd.DataFrame(rows).assign(judge="j", seed=0, benchmark="anima", dimension="overall"),
            reading,
            QUICK,
            full=False,
        )
        hits += result.low <= 20 <= result.high
    assert hits / studies > 0.92


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda table: table.drop(columns=["judge", "epoch"]), "lacks the columns epoch, judge"),
        (lambda table: table[:0], "no rows"),
        (lambda table: table.assign(score="good"), "no numbers between 0 and 1"),
        (lambda table: table.assign(score=table["score"] - 1), "no numbers between 0 and 1"),
        (lambda table: table.assign(study="other"), "belongs to the study 'other', not to 'drawn'"),
        (lambda table: pd.concat([table, table.assign(study="other")]), "mixes the studies drawn, other"),
        (lambda table: pd.concat([table, table]), "twice"),
        (lambda table: table.assign(item_id=None), "rows without item_id"),
    ],
)
def test_spoiled_scores_get_one_clear_line(scores, spoil, message):
    with pytest.raises(InputError, match=message) as caught:
        scores_module.check_scores(spoil(scores), study="drawn")
    assert "\n" not in str(caught.value)


def test_broken_files_get_one_clear_line(scores, tmp_path):
    study = Study(tmp_path)
    with pytest.raises(InputError, match="has no scores.parquet"):
        study.table("scores")
    scores.to_parquet(tmp_path / "scores.parquet")
    whole = (tmp_path / "scores.parquet").read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"not a table"):
        (tmp_path / "scores.parquet").write_bytes(content)
        with pytest.raises(InputError, match="is damaged") as caught:
            study.table("scores")
        assert "\n" not in str(caught.value)
    for content in (b"", b"[{", b"[]", b'{"a": 1}', b'[{"claim": "C1"}]', b"\xff\xfe"):
        (tmp_path / "claims.json").write_bytes(content)
        with pytest.raises(InputError) as caught:
            claims.read_claims(tmp_path / "claims.json")
        assert "\n" not in str(caught.value)


def test_figures_of_odd_studies(scores, tmp_path):
    for odd in (
        scores[scores["model"] == "mid"],
        scores[scores["benchmark"] == "anima"],
        scores.assign(score=0.0),
        frame(items=1, translated=0),
        scores.assign(model=scores["model"].replace("mid", "some-hub/model")),
        scores.assign(benchmark=scores["benchmark"].replace("moru", "our-own")),
    ):
        paths = looks.save_figure(figures.plot_scores(odd, QUICK), tmp_path / "figures", "scores")
        assert [path.suffix for path in paths] == [".png", ".svg"] and all(
            path.stat().st_size > 1000 for path in paths
        )
        assert len(figures.score_table(odd, settings=QUICK)) == odd["model"].nunique()


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, compassion_repro.stats.claims, compassion_repro.report.figures; print(sorted({'torch',"
        " 'transformers', 'trl', 'datasets', 'inspect_ai', 'seaborn', 'matplotlib', 'statsmodels', 'scipy'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def grades_of(table, unread=(), generator=np.random.default_rng(0)):
    """Grades with four replies an answer whose mean is its score, those of the given models in part
    unreadable.
    """
    rows = table[table["dimension"] == "overall"]
    parts = [
        rows.assign(dimension=f"d{k}", grade=(rows["score"] * 4 > k + 0.5).astype(float), attempted=True)
        for k in range(4)
    ]
    grades = pd.concat(parts, ignore_index=True).drop(columns="score")
    lost = grades["model"].isin(unread) & (generator.random(len(grades)) < 0.3)
    return grades.assign(grade=grades["grade"].mask(lost))


def test_scores_from_grades_are_the_official_ones(finished):
    grades, given = (pd.read_parquet(finished / f"{name}.parquet") for name in ("grades", "scores"))
    again = score_frames.scores_from_grades(
        grades, weights=score_frames.dimension_weights(given), study="study"
    )
    keys = ["judge", "model", "seed", "benchmark", "question_id", "epoch", "dimension"]
    pd.testing.assert_series_equal(
        again.set_index(keys)["score"].sort_index(), given.set_index(keys)["score"].sort_index()
    )
    assert len(score_frames.check_scores(again, "study")) == len(given)
    # grades do not name the frame of a question
    again["cluster"] = again.set_index(keys).index.map(given.set_index(keys)["cluster"])
    table, other = (claims.judge_claims(frame, {}, TINY, grades) for frame in (given, again))
    assert table.to_json() == other.to_json()
    for record in table.records:  # every reply was readable
        if record.estimate is not None:
            assert record.estimate_counting_unparsed_as_wrong == record.interval


def test_weights_of_dimensions_are_found_in_the_scores():
    generator = np.random.default_rng(0)
    grades = pd.DataFrame(
        [
            (
                "j",
                "mid",
                0,
                "anima",
                "en",
                f"q{i}",
                f"q{i}",
                1,
                dimension,
                float(generator.integers(2)) if generator.random() > 0.2 else None,
                True,
            )
            for i in range(60)
            for dimension in "abc"
        ],
        columns=list(score_frames.GRADE_COLUMNS),
    )
    weights = {"anima": {"a": 1.0, "b": 2.0, "c": 5.0}}
    found = score_frames.dimension_weights(score_frames.scores_from_grades(grades, weights=weights))["anima"]
    assert [found[d] / found["a"] for d in "abc"] == pytest.approx([1, 2, 5])


def test_every_estimate_is_given_both_ways(scores):
    grades = grades_of(scores, unread=["sft-help"])
    given = score_frames.scores_from_grades(grades, study="drawn")
    record = claims.judge_claims(given, {}, TINY, grades)["C1"]
    wrong = score_frames.scores_from_grades(grades, "wrong", study="drawn")
    assert (
        record.estimate_counting_unparsed_as_wrong
        == estimates.contrast(wrong, difference("sft-code", "sft-help"), TINY.statistics).interval
    )
    # the unreadable arm falls
    assert record.estimate_counting_unparsed_as_wrong.estimate > record.estimate + 3
    unread = grades["grade"].isna().groupby([grades["model"], grades["benchmark"]]).mean()
    assert 0.25 < unread["sft-help", "anima"] < 0.35 and unread["mid", "anima"] == 0
    assert claims.judge_claims(given, {}, TINY)["C1"].estimate_counting_unparsed_as_wrong is None
    with pytest.raises(InputError, match="lacks the column attempted"):
        score_frames.scores_from_grades(grades.drop(columns="attempted"))


def test_several_judges_and_their_mean(scores):
    mild = scores.assign(judge="mild", score=np.minimum(1, scores["score"] + 0.1))
    lost = (mild["model"] == "mid") & (mild["question_id"] == "q1-en_en")
    table = claims.judge_claims(pd.concat([scores, mild.assign(score=mild["score"].mask(lost))]), {}, TINY)
    assert {record.judge for record in table.records} == {"indicator", "mild", scores_module.MEAN_OF_JUDGES}
    single = claims.judge_claims(scores, {}, TINY)
    assert table["C1", "indicator"] == single["C1"]  # other judges change nothing
    both = estimates.contrast(
        pd.concat([scores, mild])
        .groupby([c for c in scores if c not in ("score", "judge")])["score"]
        .mean()
        .reset_index()
        .assign(judge="x"),
        difference("sft-code", "sft-help"),
    )
    assert table["C1", scores_module.MEAN_OF_JUDGES].estimate == pytest.approx(both.estimate)
    # only where all judges graded
    assert (
        table["C6-SFT", scores_module.MEAN_OF_JUDGES].questions,
        table["C6-SFT", "indicator"].questions,
    ) == (35, 36)
    blind = claims.judge_claims(pd.concat([scores, mild.assign(judge_valid=False)]), {}, TINY)
    assert (blind["C1", scores_module.MEAN_OF_JUDGES].verdict, blind["C1", "indicator"].verdict) == (
        "not testable",
        "holds for these checkpoints",
    )


def test_holm_decides_and_never_disagrees_with_its_interval():
    from statsmodels.stats.multitest import multipletests

    grpo = {"grpo-help": 0.3, "grpo-code": 0.36, "grpo-help@base": 0.05, "grpo-code@base": 0.05}
    for random_seed in range(2):
        table = claims.judge_claims(
            frame(
                {**LEVELS, **grpo, "sft-help": 0.4, "sft-code": 0.5},
                items=40,
                translated=20,
                random_seed=random_seed,
            ),
            {},
            TINY,
        )
        for family in ("superiority", "equivalence and non-inferiority", "exploratory"):
            members = [r for r in table.records if r.family == family and r.estimate is not None]
            assert len(members) >= 3 and {record.family_size for record in members} == {len(members)}
            assert [record.adjusted_p for record in members] == pytest.approx(
                multipletests([record.p for record in members], method="holm")[1]
            )
            for record in members:
                assert record.adjusted_low <= record.low + 1e-9 and record.adjusted_high >= record.high - 1e-9
                if record.kind == "superiority":
                    assert (record.adjusted_low > 0 or record.adjusted_high < 0) == (record.adjusted_p < 0.05)
                else:
                    assert (verdicts.verdict_of(record.kind, record.decisive, 5)[0] == "supported") == (
                        record.adjusted_p < 0.05
                    )
        parts = [table["C1"], table["C2"]]
        assert table["C7"].family == "superiority" and table["C7"].p == max(part.p for part in parts)
        assert table["C7"].adjusted_p == max(part.adjusted_p for part in parts)
        assert (table["C7"].verdict == "holds for these checkpoints") == (
            table["C7"].adjusted_p < 0.05 and min(part.estimate for part in parts) > 0
        )


def test_agreement_with_the_paper_is_a_column_of_its_own(scores):
    exact = estimates.contrast(scores, difference("sft-code", "sft-help")).estimate
    one = [reading for reading in readings() if reading.id == "C1"][0]
    from dataclasses import replace

    from compassion_repro.paper import Claim

    for paper, agreement in ((exact + 1, "sign and size"), (exact + 60, "sign only"), (-60.0, "neither")):
        record = claims.judge_claims(
            scores, {}, TINY, claims=[Claim("C1", "", "A", (replace(one, paper=paper),))]
        )["C1"]
        assert (record.agreement, record.verdict, record.estimate) == (
            agreement,
            "holds for these checkpoints",
            pytest.approx(exact),
        )


def test_general_reasoning_is_read_on_any_other_benchmark():
    table = frame({**LEVELS, "sft-code": 0.5}, items=120, translated=0, random_seed=4)
    table["benchmark"] = table["benchmark"].replace("moru", "logic")
    preset = TINY.model_copy(
        update={
            "benchmarks": {
                "anima": TINY.benchmarks["anima"],
                "logic": TINY.benchmarks["moru"].model_copy(update={"task": "hellaswag"}),
            }
        }
    )
    found = claims.judge_claims(table, {}, preset)
    assert (found["C8-SFT-logic"].verdict, found["C8-SFT-logic"].kind, found["C8-SFT-logic"].family) == (
        "holds for these checkpoints",
        "non-inferiority",
        "equivalence and non-inferiority",
    )
    assert found["C8-GRPO-logic"].verdict == "not tested" and "grpo-code" in found["C8-GRPO-logic"].reason
    without_base = claims.judge_claims(table[table["model"] != "base"], {}, preset)
    # mid's own score is what could be lost
    assert (without_base["C8-SFT-logic"].verdict, without_base["C6-SFT"].verdict) == (
        "holds for these checkpoints",
        "not testable",
    )
    floor = claims.judge_claims(
        frame({model: 0.02 for model in LEVELS}, items=120, translated=0).replace(
            {"benchmark": {"moru": "logic"}}
        ),
        {},
        preset,
    )
    assert floor["C8-SFT-logic"].verdict == "not testable" and "to lose" in floor["C8-SFT-logic"].reason
    assert claims.judge_claims(table, {}, TINY)["C8"].verdict == "not tested"


def test_suffix_variants_of_c5(scores):
    answers = scores.assign(
        prompt=[
            "Question: " + q + (" Answer:" if language == "en" and q < "q2" else "?") + "\nAnswer:"
            for q, language in zip(scores["question_id"], scores["language"])
        ]
    )
    table = claims.judge_claims(scores, {}, TINY, answers=answers)
    left = scores[(scores["language"] != "en") | (scores["question_id"] >= "q2")]
    assert table["C5b-no-suffix"].estimate == pytest.approx(
        claims.judge_claims(left, {}, TINY)["C5b"].estimate
    )
    assert table["C5b-no-suffix"].questions < table["C5b"].questions and table["C5b-no-suffix"].family is None
    assert "strip_suffix" in table["C5b-stripped"].reason
    stripped = claims.judge_claims(
        pd.concat([scores, scores[scores["benchmark"] == "anima"].assign(benchmark="anima-stripped")]),
        {},
        TINY,
    )
    assert stripped["C5b-stripped"].estimate == pytest.approx(table["C5b"].estimate)
    assert table["C5b"].ratio.shape == "interval" and table["C5b"].paper_ratio == 4.5


def test_retention_is_a_share_or_says_why_not(scores):
    kept = estimates.retention(frame(seeds=3)).set_index(["benchmark", "model"])
    assert set(model for _, model in kept.index) == {"sft-help", "sft-code"}  # only arms that start from mid
    row, odds = kept.loc[("anima", "sft-help")], {p: np.log(p / (1 - p)) for p in LEVELS.values()}
    assert row["points_low"] < 0.15 / 0.45 < row["points_high"]
    truth = (odds[0.2] - odds[0.05]) / (odds[0.5] - odds[0.05])
    assert row["low"] < row["retention"] < row["high"] and row["retention"] == pytest.approx(truth, abs=0.12)
    assert row["level"] == "the procedure" and row["retention"] > row["points"]
    assert kept.loc[("anima", "sft-code"), "points"] == pytest.approx(0.95, abs=0.15)
    headless = estimates.retention(scores[scores["model"] != "base"])
    assert headless["retention"].isna().all() and set(headless["note"]) == {"no scores of base"}


@pytest.mark.long
def test_interval_of_a_difference_of_gains_covers_at_three_seeds():
    "150 drawn studies of C0 at the floor through `contrast` itself, in log odds and in points."
    odds = next(reading for reading in readings() if reading.id == "C0-SFT")
    points, hits = replace(odds, scale="points"), {"log odds": 0, "points": 0}
    chances = {"sft-code": 0.10, "sft-help": 0.04, "sft-code@base": 0.03, "sft-help@base": 0.02}
    generator, index = (
        np.random.default_rng(8),
        pd.MultiIndex.from_product([range(24), range(3), chances], names=["item", "seed", "model"]),
    )
    for _ in range(150):
        shift = generator.normal(0, 0.3, size=(1, 3, 4)) + generator.normal(0, 0.8, size=(24, 1, 4))
        mean = np.array(list(chances.values()))
        rows = (
            pd.DataFrame(
                {"score": (generator.binomial(10, np.clip(mean * (1 + 0.5 * shift), 0, 1)) / 10).ravel()},
                index=index,
            )
            .reset_index()
            .assign(
                item_id=lambda t: t["item"].astype(str), question_id=lambda t: t["item_id"], language="en"
            )
        )
        scores = rows.assign(judge="j", benchmark="anima", epoch=1, dimension="overall")
        for reading in (odds, points):
            result = estimates.contrast(scores, reading, Statistics(resamples=100), full=False)
            weights = {cell.model: cell.weight for cell in reading.cells}
            truth = {
                "points": 100 * sum(weights[model] * p for model, p in chances.items()),
                "log odds": sum(weights[model] * np.log(p / (1 - p)) for model, p in chances.items()),
            }[reading.scale]
            hits[reading.scale] += result.low <= truth <= result.high
    assert min(hits.values()) / 150 > 0.93, hits


def test_planning_agrees_with_what_a_study_reports(scores):
    result = estimates.contrast(scores, difference("sft-code", "sft-help"), QUICK)
    error, freedom = result.spread[0]
    assert inference.detectable([((error / 100) ** 2, freedom)]) == pytest.approx(result.detectable)
    assert (
        result.smallest_margin == pytest.approx((result.high - result.low) / 2)
        and result.smallest_margin < result.margin_with_power
    )
    plan = [
        inference.detectable(inference.expected_spread(items, epochs, seeds))
        for items, epochs, seeds in ((64, 1, 1), (64, 5, 1), (114, 5, 1), (64, 5, 3), (64, 5, 5))
    ]
    assert plan[0] > plan[1] > plan[2] and plan[3] > plan[4]


def test_a_stripped_question_reaches_the_model_but_not_the_judge(tmp_path):
    evaluate = pytest.importorskip("compassion_repro.evaluation.generate")
    from compassion_repro.data.world import assets
    from compassion_repro.evaluation.benchmarks import load_benchmark
    from compassion_repro.study import Benchmark
    from compassion_repro.training.templates import load_tokenizer

    plain = Benchmark(task="anima", data="world:anima", epochs=1, size={"en": 3, "es": 2})
    words = load_benchmark("anima", plain, tmp_path).questions[0]["question"].split()[-1]
    task = load_benchmark("anima-stripped", plain.model_copy(update={"strip_suffix": words}), tmp_path)
    tokenizer = load_tokenizer(assets() / "base")
    work = evaluate._work(task.questions, tokenizer)
    for row in work:
        stripped = row["question"].endswith(words)
        assert row.get("asked", row["question"]) == (
            row["question"].removesuffix(words).rstrip() if stripped else row["question"]
        )
        assert tokenizer.decode(row["ids"]).count(words) == (0 if stripped else row["question"].count(words))
    assert any("asked" in row for row in work)
    # what the judge reads
    assert {sample.input for sample in task.task.dataset} == {row["question"] for row in work}


def test_scores_reload_and_reanalyse_without_the_heavy_libraries(scores, tmp_path):
    scores.to_parquet(tmp_path / "scores.parquet")
    grades_of(scores, unread=["mid"]).to_parquet(tmp_path / "grades.parquet")
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "trl", "datasets", "inspect_ai", "inspect_evals", "peft", "accelerate"}: raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
import pandas as pd
from compassion_repro.stats import claims, estimates, scores; from compassion_repro.report import figures
from compassion_repro.presets import load_preset
TINY = load_preset('tiny')
scores = scores.check_scores(pd.read_parquet(sys.argv[1] + "/scores.parquet"), "drawn")
table = claims.judge_claims(scores, {}, TINY, pd.read_parquet(sys.argv[1] + "/grades.parquet"))
open(sys.argv[1] + "/claims.json", "w").write(table.to_json())
print(claims.read_claims(sys.argv[1] + "/claims.json")["C1"].verdict, len(estimates.retention(scores)), len(figures.score_table(scores)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "holds for these checkpoints 4 6", done.stderr[-2000:]
