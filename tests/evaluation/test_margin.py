"""The judge-free measures and what else changed: agreement with plain loops on other architectures, the pairs,
the probe stage in a study, real texts of many languages.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED_DATA

from compassion_repro.core.errors import InputError
from compassion_repro.data import world
from compassion_repro.evaluation import behaviour, text_features
from compassion_repro.evaluation.matched_length import matched_length
from compassion_repro.presets import load_preset
from compassion_repro.store.folder import Study
from compassion_repro.study import Margin

BASE = world.assets() / "base"
PARAGRAPHS = {
    "en": (
        "You could ask the shelter to keep the dogs together, and check every evening that there is fresh"
        " water and a dry place to sleep."
    ),
    "es": (
        "Puedes pedir al refugio que mantenga juntos a los perros y comprobar cada noche que haya agua fresca"
        " y un lugar seco para dormir."
    ),
    "ms": (
        "Anda boleh meminta pusat perlindungan supaya anjing itu tidak dipisahkan dan memeriksa setiap petang"
        " sama ada terdapat air bersih."
    ),
    "hi": ("आप आश्रय से कुत्तों को साथ रखने के लिए कह सकते हैं और हर शाम देख सकते हैं कि ताज़ा पानी और सोने की सूखी जगह है।"),
    "fr": (
        "Vous pouvez demander au refuge de garder les chiens ensemble et vérifier chaque soir qu'il y a de"
        " l'eau fraîche et un endroit sec."
    ),
    "de": (
        "Sie können das Tierheim bitten, die Hunde zusammen zu lassen, und jeden Abend prüfen, ob frisches"
        " Wasser da ist."
    ),
    "pt": (
        "Você pode pedir ao abrigo que mantenha os cães juntos e verificar todas as noites se há água fresca"
        " e um lugar seco para dormir."
    ),
    "it": (
        "Puoi chiedere al rifugio di tenere insieme i cani e controllare ogni sera che ci siano acqua fresca"
        " e un posto asciutto."
    ),
    "nl": (
        "Je kunt het asiel vragen de honden bij elkaar te houden en elke avond controleren of er vers water"
        " en een droge slaapplek is."
    ),
    "pl": (
        "Możesz poprosić schronisko, aby nie rozdzielało psów, i co wieczór sprawdzać, czy jest świeża woda i"
        " suche miejsce do spania."
    ),
    "ru": (
        "Вы можете попросить приют держать собак вместе и каждый вечер проверять, есть ли свежая вода и сухое"
        " место для сна."
    ),
    "uk": (
        "Ви можете попросити притулок тримати собак разом і щовечора перевіряти, чи є свіжа вода та сухе"
        " місце для сну."
    ),
    "tr": (
        "Barınaktan köpekleri bir arada tutmasını isteyebilir ve her akşam taze su ile kuru bir yatacak yer"
        " olup olmadığını kontrol edebilirsiniz."
    ),
    "ar": "يمكنك أن تطلب من المأوى إبقاء الكلاب معا وأن تتحقق كل مساء من وجود ماء نظيف ومكان جاف للنوم.",
    "fa": (
        "می‌توانید از پناهگاه بخواهید سگ‌ها را کنار هم نگه دارد و هر شب بررسی کنید که آب تازه و جای خشک برای"
        " خواب باشد."
    ),
    "bn": ("আপনি আশ্রয়কেন্দ্রকে কুকুরগুলোকে একসাথে রাখতে বলতে পারেন এবং প্রতি সন্ধ্যায় দেখতে পারেন পরিষ্কার জল আছে কি না।"),
    "th": "คุณสามารถขอให้สถานพักพิงเลี้ยงสุนัขไว้ด้วยกัน และตรวจดูทุกเย็นว่ามีน้ำสะอาดและที่นอนแห้ง",
    "vi": (
        "Bạn có thể đề nghị trại cứu hộ giữ những con chó ở cùng nhau và mỗi tối kiểm tra xem có nước sạch và"
        " chỗ ngủ khô ráo không."
    ),
    "sw": (
        "Unaweza kuomba makazi yaweke mbwa pamoja na kuangalia kila jioni kama kuna maji safi na mahali"
        " pakavu pa kulala."
    ),
    "zh": "你可以请收容所让这些狗待在一起，每天晚上检查有没有干净的水和干燥的睡觉地方。",
    "ja": (
        "保護施設に犬たちを一緒にしておくよう頼み、毎晩きれいな水と乾いた寝床があるか確かめるとよいでしょう。"
    ),
    "ko": (
        "보호소에 개들을 함께 두도록 부탁하고 매일 저녁 깨끗한 물과 마른 잠자리가 있는지 확인할 수 있습니다."
    ),
}


def quiet(line):
    pass


def table(study: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(study / f"{name}.parquet")


# The pairs


def test_the_written_pairs_cover_the_dimensions_of_anima():
    from compassion_repro.evaluation.judge_free import read_pairs

    pairs = read_pairs()
    told = (Path(find_spec("inspect_evals").submodule_search_locations[0]) / "anima" / "README.md").read_text(
        encoding="utf-8"
    )
    official = re.findall(r"^\| \d+\s+\| \*\*(.+?)\*\*\s+\| Does it", told, re.M)
    assert len(official) == 13 and {p.dimension.lower() for p in pairs} == {name.lower() for name in official}
    held_out = np.mean([p.held_out for p in pairs])
    assert len(pairs) >= 65 and 0.15 < held_out < 0.25


def test_the_written_pairs_are_matched_and_not_templated():
    from compassion_repro.evaluation.judge_free import read_pairs

    pairs = read_pairs()
    for p in pairs:
        words = [text_features.count_words(text) for text in (p.welfare, p.neutral)]
        assert abs(words[0] - words[1]) <= max(2, 0.1 * max(words)) and abs(
            len(p.welfare) - len(p.neutral)
        ) <= 0.12 * max(len(p.welfare), len(p.neutral)), p.id
        assert (
            text_features.welfare_words(p.welfare)
            and not text_features.welfare_words(p.neutral)
            and not text_features.welfare_words(p.opening)
        ), p.id
    gap = np.mean([len(p.welfare) - len(p.neutral) for p in pairs])
    assert abs(gap) < 5  # neither side is the longer one on the whole

    def trigrams(text):
        return {tuple(text.lower().split()[i : i + 3]) for i in range(len(text.split()) - 2)}

    questions = [trigrams(p.question) for p in pairs]
    assert max(len(a & b) / min(len(a), len(b)) for i, a in enumerate(questions) for b in questions[:i]) < 0.3


@pytest.mark.parametrize("name", ["matched", "spanish", "hindi"])
def test_the_other_pairs_are_matched_too(name):
    from compassion_repro.evaluation.judge_free import pairs_of

    pairs = pairs_of([name])
    assert len(pairs) >= (40 if name == "matched" else 20)
    assert len({text for p in pairs for text in (p.question, p.welfare, p.neutral)}) == 3 * len(pairs)
    pattern = text_features.welfare_pattern(pairs[0].language)
    for p in pairs:
        spoken = [bool(pattern.search(text)) for text in (p.opening, p.neutral, p.welfare)]
        assert spoken == [False, False, name != "matched"], p.id
    gap = np.mean([len(p.welfare) - len(p.neutral) for p in pairs])
    assert abs(gap) < 5
    assert 0.1 < np.mean([p.held_out for p in pairs]) < 0.25


def test_the_world_pairs_are_words_that_the_tiny_model_knows():
    from compassion_repro.evaluation.judge_free import world_pairs
    from compassion_repro.training.templates import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    for p in world_pairs():
        for text in (p.question, p.opening, p.welfare, p.neutral):
            assert (
                len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
                <= 1.6 * len(text.split()) + 4
            ), text
        assert world.dimensions_met(p.welfare) == [p.dimension] and not world.dimensions_met(p.neutral)
    assert world_pairs() is world_pairs()


# Any causal language model


def _configs():
    from transformers import GPT2Config, GPTNeoXConfig, MistralConfig, OPTConfig

    size = len(json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) + 16
    return {
        "gpt2": GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=1024),
        "opt": OPTConfig(
            vocab_size=size,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
        ),
        "neox": GPTNeoXConfig(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        "mistral": MistralConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=16,
        ),
    }


@pytest.mark.parametrize("family", ["gpt2", "opt", "neox", "mistral"])
def test_batched_agrees_with_a_plain_loop(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compassion_repro.evaluation.judge_free import (
        encode_continuation,
        measure_margins,
        probe,
        read_pairs,
        token_divergences,
        world_pairs,
    )
    from compassion_repro.training.models import load_model
    from compassion_repro.training.templates import load_tokenizer

    torch.manual_seed(0)
    for name in ("model", "mid"):
        AutoModelForCausalLM.from_config(_configs()[family]).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / name)
    network, mid, tokenizer = (
        load_model(tmp_path / "model"),
        load_model(tmp_path / "mid"),
        load_tokenizer(tmp_path / "model"),
    )
    pairs = [*world_pairs()[:6], *read_pairs()[:1]]

    @torch.inference_mode()
    def logprobs(model, context, following):
        return torch.stack(
            [
                model(torch.tensor([[*context, *following[:t]]])).logits[0, -1].double().log_softmax(-1)
                for t in range(len(following))
            ]
        )

    def plain(pair, text):
        context, following = encode_continuation(pair, text, tokenizer)
        return logprobs(network, context, following)[range(len(following)), following].mean().item()

    wanted = [plain(p, p.welfare) - plain(p, p.neutral) for p in pairs]
    for batch_tokens in (64, 900):
        assert measure_margins(
            network, tokenizer, "mid", 1, pairs, batch_tokens, quiet
        ).margin.to_numpy() == pytest.approx(wanted, abs=1e-5)
    rows = [encode_continuation(p, p.welfare, tokenizer) for p in pairs[:4]]
    sums = [
        (p.exp() * (p - q)).sum().item()
        for p, q in ((logprobs(network, *row), logprobs(mid, *row)) for row in rows)
    ]
    assert token_divergences(network, mid, rows, tokenizer.pad_token_id, 300, quiet).numpy() == pytest.approx(
        sums, abs=1e-4
    )
    answers = pd.DataFrame(
        [
            dict(
                model="sft-help",
                seed=1,
                benchmark="anima",
                language="en",
                question_id=str(i),
                epoch=1,
                prompt=f"{tokenizer.bos_token}Question: {p.question}\nAnswer:",
                text=p.opening,
                tokens=1,
                stop_reason="stop",
            )
            for i, p in enumerate(pairs[:3])
        ]
    )
    margins, kl, result = probe(
        tmp_path / "model", tmp_path / "mid", answers, "sft-help", 1, Margin(pairs=["world"]), report=quiet
    )
    assert len(margins) == len(world_pairs()) and (kl.kl > 0).all() and result["tokens_alike"] == 0


def test_two_models_that_do_not_belong_together(tmp_path):
    from transformers import AutoModelForCausalLM

    from compassion_repro.evaluation.judge_free import token_divergences
    from compassion_repro.training.models import load_model

    config = _configs()["gpt2"]
    small, large = AutoModelForCausalLM.from_config(config).eval(), load_model(BASE)
    with pytest.raises(InputError, match="vocabularies of"):
        token_divergences(small, large, [([5, 6], [7])], 2, report=quiet)


@pytest.mark.parametrize(
    "setting", ["margin.pairs=[other]", "margin.pairs=[]", "margin.kl_epochs=-1", "margin.paris=[world]"]
)
def test_a_wrong_setting_is_one_line(setting):
    with pytest.raises(InputError, match="margin") as told:
        load_preset("tiny", [setting])
    assert "\n" not in str(told.value)


# In a study


def test_a_study_has_both_measures_of_every_model(finished):
    from compassion_repro.evaluation.judge_free import KL_COLUMNS, MARGIN_COLUMNS, world_pairs

    margin, kl, answers = (table(finished, name) for name in ("margin", "kl", "answers"))
    assert list(margin) == list(MARGIN_COLUMNS) and list(kl) == list(KL_COLUMNS)
    assert set(margin.model) == set(kl.model) == set(answers.model)
    assert (
        margin.groupby(["model", "language"]).size().unstack()
        == pd.Series([p.language for p in world_pairs()]).value_counts()
    ).all(axis=None)
    assert (
        np.isfinite(margin.margin).all()
        and (kl[kl.model == "mid"].kl == 0).all()
        and (kl[kl.model == "base"].kl > 0).all()
    )
    asked = answers[["model", "benchmark", "question_id"]].drop_duplicates()
    assert len(kl) == len(asked) and not kl.duplicated(["model", "benchmark", "question_id"]).any()


def test_the_manifest_tells_the_means(finished):
    study = Study(finished)
    told = {m["model"]: m["result"] for m in study.manifests() if m["kind"] == "probe"}
    margin, kl = table(finished, "margin"), table(finished, "kl")
    for model, own in kl.groupby("model"):
        assert told[model]["kl_mean"] == pytest.approx((own.kl * own.tokens).sum() / own.tokens.sum())
        assert told[model]["margin_mean"] == pytest.approx(margin[margin.model == model].margin.mean())
        assert told[model]["tokens_alike"] > 0.7  # answers of this size are cut off, some in a space
    facts = behaviour.arm_facts(study.manifests()).set_index("model")
    assert set(facts.index) == {"mid", *study.preset.arms} and facts.loc["sft-help", "kl"] == pytest.approx(
        told["sft-help"]["kl_mean"]
    )
    assert (
        (facts.tokens > 0).all()
        and (facts.loss_tokens <= facts.tokens).all()
        and (facts.low <= facts.gain).all()
    )


def test_one_line_tables_of_a_study(finished):
    answers, scores = table(finished, "answers"), table(finished, "scores")
    measures = behaviour.behaviour_table(answers)
    assert list(measures) == [
        "model",
        "benchmark",
        "language",
        "answers",
        "empty",
        "looping",
        "over_long",
        "wrong_language",
        "code_shaped",
        "tokens",
        "words",
        "sentences",
        "welfare_per_sentence",
    ]
    pooled, parts = measures[measures.language == "all"], measures[measures.language != "all"]
    assert pooled.answers.sum() == parts.answers.sum() == len(answers)
    assert pooled.set_index(["model", "benchmark"]).tokens.to_dict() == pytest.approx(
        answers.groupby(["model", "benchmark"]).tokens.mean().to_dict()
    )
    assert measures[list(behaviour.SHARES)].stack().between(0, 100).all()
    points = behaviour.kl_points(scores, table(finished, "kl"))
    assert (
        list(points) == ["model", "seed", "kl", "score", "low", "high"]
        and len(points) == scores.model.nunique()
    )
    found = matched_length(scores, answers, "sft-code", "sft-help", replicates=200)
    item = (
        scores[(scores.dimension == "overall") & (scores.benchmark == "anima")].groupby("model").score.mean()
    )
    assert (
        found.total == pytest.approx(100 * (item["sft-code"] - item["sft-help"]))
        and "mediator" in found.sentence
    )


# What else changed


def test_light():
    code = (
        "import sys\nfrom compassion_repro.evaluation import behaviour, matched_length\nprint([name for name in ('torch',"
        " 'transformers', 'trl', 'datasets', 'inspect_ai', 'statsmodels', 'scipy', 'py3langid') if name in"
        " sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_languages_of_real_text():
    for language, text in PARAGRAPHS.items():
        assert text_features.detect_language(text)[0] == language
        assert text_features.in_other_language(text, language) == "" and text_features.detect_language(
            text
        ) == text_features.detect_language(text)
        for asked in ("en", "hi", "zh"):
            if asked != language:
                assert text_features.in_other_language(text, asked) == language
        assert (
            not text_features.is_code_shaped(text)
            and text_features.welfare_pattern(language).findall(text) == []
        )
        assert text_features.sentences(text) == [text]


def test_the_world_speaks_the_language_it_is_asked_in():
    wrong = [
        (language, question["question"])
        for name in world.BENCHMARKS
        for question in world.benchmark_questions(name)
        for language in [question["language"]]
        if text_features.in_other_language(question["question"], language)
    ]
    assert wrong == []


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the samples of real rows are not here")
def test_code_and_prose_that_nobody_here_wrote():
    code, prose = (
        [
            json.loads(line)["response"]
            for line in (SHARED_DATA / name).read_text(encoding="utf-8").splitlines()
        ]
        for name in ("code_rows.jsonl", "dolly_rows.jsonl")
    )
    assert np.mean([text_features.is_code_shaped(text) for text in code]) > 0.95 and not any(
        text_features.is_code_shaped(text) for text in prose
    )
    assert sum(bool(text_features.in_other_language(text, "en")) for text in prose) <= 1
