"""Statistics on longer cases: frames as the study writes them, bad input, claims from end to end."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from compassion_repro import figures, stats
from compassion_repro.study import Cell, InputError, Reading, Statistics, load_preset

QUICK = Statistics(resamples=1000)
LEVELS = {"base": 0.05, "mid": 0.5, "sft-help": 0.2, "sft-code": 0.48, "sft-help@base": 0.05, "sft-code@base": 0.06}


def frame(levels=LEVELS, seeds=1, epochs=5, items=24, translated=12, random_seed=0, study="drawn"):
    "Scores of ANIMA (separate questions a language) and MORU (half of the items translated), with a probability of a point a model."
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
                        rows.append((model, seed, benchmark, language, item, f"{item}_{language}", epoch, "overall", generator.binomial(4, chance) / 4))
    columns = ["model", "seed", "benchmark", "language", "item_id", "question_id", "epoch", "dimension", "score"]
    return pd.DataFrame(rows, columns=columns).assign(study=study, judge="indicator", judge_valid=True)


@pytest.fixture(scope="module")
def scores(): return frame()


def difference(high, low, languages="all", benchmark="anima", kind="superiority"):
    return Reading("X", f"{high} − {low}", kind, benchmark, (Cell(high, 1, languages), Cell(low, -1, languages)))


def test_claims_end_to_end(scores, tmp_path):
    table = stats.judge_claims(scores, {}, load_preset("tiny"))
    assert [table[name].verdict for name in ("C1", "C0-SFT", "C3")] == ["supported"] * 3
    assert {table[name].verdict for name in ("C2", "C0-GRPO", "C6-GRPO", "C7", "C8")} == {"not tested"}
    assert set(record.verdict for record in table.records) <= set(stats.VERDICTS)
    assert all(record.scope == load_preset("tiny").scope and record.judge == "indicator" for record in table.records)
    (tmp_path / "claims.json").write_text(table.to_json(), encoding="utf-8")
    assert stats.read_claims(tmp_path / "claims.json") == table
    assert all(isinstance(record, dict) and record["verdict"] for record in json.loads(table.to_json()))
    assert table._repr_markdown_().count("\n|") >= len(table)
    assert table.rich_table().row_count == len(table)


def test_the_papers_direction_is_no_input(scores):
    names = {"sft-code": "sft-help", "sft-help": "sft-code", "sft-code@base": "sft-help@base", "sft-help@base": "sft-code@base"}
    table, turned = (stats.judge_claims(part, {}, load_preset("tiny")) for part in (scores, scores.assign(model=scores["model"].replace(names))))
    for name in ("C0-SFT", "C1", "C3"):
        assert turned[name].estimate == pytest.approx(-table[name].estimate)
        assert (table[name].low, table[name].high) == pytest.approx((-turned[name].high, -turned[name].low))
        assert turned[name].verdict == "contradicted"


def test_order_of_rows_does_not_matter(scores):
    shuffled = scores.sample(frac=1, random_state=3)
    assert stats.judge_claims(shuffled, {}, load_preset("tiny")).to_json() == stats.judge_claims(scores, {}, load_preset("tiny")).to_json()
    pd.testing.assert_frame_equal(stats.model_means(shuffled, settings=QUICK), stats.model_means(scores, settings=QUICK))


def test_two_equal_models_differ_by_nothing(scores):
    twins = pd.concat([scores, scores[scores["model"] == "mid"].assign(model="mid-control")])
    result = stats.contrast(twins, difference("mid", "mid-control"), QUICK)
    assert (result.estimate, result.low, result.p) == (0, None, None)
    assert stats.verdict_of("superiority", result.interval, 5)[0] == "inconclusive"


def test_seeds_are_paired_and_three_make_the_procedure():
    three = frame(seeds=3)
    assert stats.contrast(three, difference("sft-code", "sft-help"), QUICK).level == "the procedure"
    less = three[~((three["model"] == "sft-help") & (three["seed"] == 2))]
    result = stats.contrast(less, difference("sft-code", "sft-help"), QUICK)
    assert (result.seeds, result.level, sorted(result.per_seed)) == (2, "these checkpoints", ["0", "1"])
    apart = three[(three["model"] != "sft-help") | (three["seed"] == 2)]
    apart = apart[(apart["model"] != "sft-code") | (apart["seed"] < 2)]
    with pytest.raises(InputError, match="no seeds in common"): stats.contrast(apart, difference("sft-code", "sft-help"), QUICK)
    table = stats.judge_claims(apart, {}, load_preset("tiny"))
    assert table["C1"].verdict == "not tested" and "no seeds in common" in table["C1"].reason


def test_nulls_are_left_out_and_counted(scores):
    gone = scores.copy()
    gone.loc[(gone["model"] == "mid") & (gone["question_id"] == "q1-en_en"), "score"] = None
    gone.loc[(gone["model"] == "mid") & (gone["question_id"] == "q2-en_en") & (gone["epoch"] == 1), "score"] = None
    means = stats.model_means(gone, settings=QUICK).set_index(["benchmark", "model"]).loc[("anima", "mid")]
    assert (means["nulls"], means["questions"]) == (6, 35)
    result = stats.contrast(gone, difference("sft-code", "mid"), QUICK)
    assert (result.questions, result.dropped) == (35, 1)


def test_a_whole_benchmark_unscored(scores):
    mute = scores.assign(score=scores["score"].where(scores["benchmark"] != "moru"))
    table = stats.judge_claims(mute, {}, load_preset("tiny"))
    assert table["C3"].verdict == "not tested" and "no question is scored" in table["C3"].reason
    assert set(stats.model_means(mute, settings=QUICK)["benchmark"]) == {"anima"}
    with pytest.raises(InputError, match="no scored questions"): stats.model_means(scores.assign(score=np.nan), settings=QUICK)


def test_null_claims_need_something_to_lose(scores):
    kept = frame({**LEVELS, "sft-code": 0.5}, items=120, translated=60, random_seed=4)
    assert stats.judge_claims(kept, {}, load_preset("tiny"))["C6-SFT"].verdict == "supported"
    lost = stats.judge_claims(frame({**LEVELS, "sft-code": 0.1}), {}, load_preset("tiny"))["C6-SFT"]
    assert lost.verdict == "contradicted" and lost.sensitivity == {"3": "contradicted", "10": "contradicted"}
    floor = stats.judge_claims(frame({model: 0.05 for model in LEVELS}), {}, load_preset("tiny"))
    assert {floor[name].verdict for name in ("C4a", "C4b", "C6-SFT")} == {"not testable"}
    headless = stats.judge_claims(scores[scores["model"] != "base"], {}, load_preset("tiny"))
    assert headless["C6-SFT"].verdict == "not testable" and "base" in headless["C6-SFT"].reason


def test_untrained_arms_and_a_judge_that_cannot_read(scores):
    table = stats.judge_claims(scores, {"sft-help": {"trained": False, "reason": "loss 2.0 -> 2.1"}, "mid": {"trained": True, "reason": ""}}, load_preset("tiny"))
    assert table["C1"].verdict == "not testable" and "sft-help was not trained: loss 2.0 -> 2.1" in table["C1"].reason
    assert table["C6-SFT"].verdict != "not testable"
    blind = stats.judge_claims(scores.assign(judge_valid=False), {}, load_preset("tiny"))
    assert {record.verdict for record in blind.records if record.estimate is not None} == {"not testable"}
    assert "scores mean nothing" in figures.plot_scores(scores.assign(judge_valid=False), QUICK).axes[0].get_title()


def test_a_translated_item_is_one_item():
    # the same answers in three languages: three times the questions, not three times the evidence
    one = frame(items=30, translated=0)
    one = one[one["benchmark"] == "moru"]
    three = pd.concat([one.assign(language=language, question_id=one["item_id"] + language) for language in ("en", "ms", "hi")])
    reading = difference("sft-code", "sft-help", benchmark="moru")
    single, triple = stats.contrast(one, reading, QUICK), stats.contrast(three, reading, QUICK)
    assert (triple.questions, triple.items) == (90, 30)
    assert (triple.low, triple.high) == pytest.approx((single.low, single.high))
    apart = stats.contrast(three.assign(item_id=three["question_id"]), reading, QUICK)
    assert apart.high - apart.low < 0.7 * (triple.high - triple.low)


def test_interval_covers_through_the_real_path():
    "300 drawn studies through `contrast` itself, en minus other on separate items."
    hits, studies, generator = 0, 300, np.random.default_rng(5)
    reading = Reading("X", "", "superiority", "anima", (Cell("sft-code", 1, "other"), Cell("mid", -1, "other"), Cell("mid", 1, "en"), Cell("sft-code", -1, "en")))
    item = [f"{language}{index}" for language, count in (("en", 24), ("ms", 24)) for index in range(count)]
    truth = {("mid", "e"): 0.5, ("mid", "m"): 0.1, ("sft-code", "e"): 0.4, ("sft-code", "m"): 0.2}
    for _ in range(studies):
        common = generator.normal(0, 0.05, len(item))
        rows = [dict(model=model, item_id=i, question_id=i, language=i[:2], score=np.clip(truth[model, i[0]] + shift + generator.normal(0, 0.05), 0, 1))
                for model in ("mid", "sft-code") for i, shift in zip(item, common)]
        result = stats.contrast(pd.DataFrame(rows).assign(judge="j", seed=0, benchmark="anima", dimension="overall"), reading, Statistics(resamples=300))
        hits += result.low <= 20 <= result.high
    assert hits / studies > 0.91


@pytest.mark.parametrize("spoil, message", [
    (lambda table: table.drop(columns=["judge", "epoch"]), "lacks the columns epoch, judge"),
    (lambda table: table[:0], "no rows"),
    (lambda table: table.assign(score="good"), "no numbers between 0 and 1"),
    (lambda table: table.assign(score=table["score"] - 1), "no numbers between 0 and 1"),
    (lambda table: table.assign(study="other"), "belongs to the study 'other', not to 'drawn'"),
    (lambda table: pd.concat([table, table.assign(study="other")]), "mixes the studies drawn, other"),
    (lambda table: pd.concat([table, table]), "twice"),
    (lambda table: table.assign(item_id=None), "rows without item_id"),
])
def test_spoiled_scores_get_one_clear_line(scores, tmp_path, spoil, message):
    spoil(scores).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(InputError, match=message) as caught: stats.read_scores(tmp_path / "scores.parquet", study="drawn")
    assert "\n" not in str(caught.value)


def test_broken_files_get_one_clear_line(scores, tmp_path):
    path = tmp_path / "scores.parquet"
    with pytest.raises(InputError, match="no scores at"): stats.read_scores(path)
    scores.to_parquet(path)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"not a table"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable Parquet file") as caught: stats.read_scores(path)
        assert "\n" not in str(caught.value)
    for content in (b"", b"[{", b'{"a": 1}', b'[{"claim": "C1"}]', b"\xff\xfe"):
        (tmp_path / "claims.json").write_bytes(content)
        with pytest.raises(InputError) as caught: stats.read_claims(tmp_path / "claims.json")
        assert "\n" not in str(caught.value)


def test_figures_of_odd_studies(scores, tmp_path):
    for odd in (scores[scores["model"] == "mid"], scores[scores["benchmark"] == "anima"], scores.assign(score=0.0), frame(items=1, translated=0),
                scores.assign(model=scores["model"].replace("mid", "some-hub/model")), scores.assign(benchmark=scores["benchmark"].replace("moru", "our-own"))):
        paths = figures.save_figure(figures.plot_scores(odd, QUICK), tmp_path / "figures", "scores")
        assert [path.suffix for path in paths] == [".png", ".svg"] and all(path.stat().st_size > 1000 for path in paths)
        assert len(figures.score_table(odd, settings=QUICK)) == odd["model"].nunique()


def test_importing_loads_nothing_heavy():
    code = "import sys, compassion_repro.stats, compassion_repro.figures; print(sorted({'torch', 'transformers', 'trl', 'datasets', 'inspect_ai', 'seaborn', 'matplotlib', 'statsmodels', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
