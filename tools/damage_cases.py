"""What is damaged in turn, how, and what must come of it: the cases that `damage.py` tries.

A case is a copy of a sound folder, a damage, and a command line. What nobody can know is not asked: a flipped
bit that leaves another valid letter in a user's own text is that user's text. In what the package itself
wrote, every bit counts.
"""

from dataclasses import dataclass
from functools import partial

from conftest import settings


@dataclass(frozen=True)
class Case:
    "One damage to one input."

    family: str  # what kind of input
    target: str  # the file, within the sound folder; may be a pattern
    how: str  # the damage
    words: tuple[str, ...]  # command line; {} is the copy
    base: str = "study"  # which sound folder is copied
    check: str = "study"  # what must hold where the command succeeds
    said: str = ""  # what a refusal must name
    first: tuple[str, ...] = ()  # parts of the copy that are taken away, so that the command has work to do
    mended: bool = False  # all of it can be made again, so a refusal is no answer

    @property
    def name(self) -> str:
        return f"{self.family}: {self.target} {self.how} ({' '.join(self.words[:1])})"


RUN = ("run", "--preset", "smoke", "--out", "{}/study", "--no-report", "--no-reuse", *settings())
FRESH = ("run", "--preset", "smoke", "--out", "{}/new", "--no-report", "--no-reuse", *settings())
JUDGED = ("--judge", "purse/fine", "--yes")
EVALUATE = (
    *("--bench", "tiny-anima,tiny-moru", "--out", "{}/evaluation"),
    *("--limit", "2", "--epochs", "2", "--max-tokens", "8"),
    *JUDGED,
)


def cross(family: str, targets: str, hows: str, words: tuple[str, ...], **more) -> list[Case]:
    "Every target with every damage."
    return [Case(family, target, how, words, **more) for target in targets.split() for how in hows.split()]


# ---- what stages left


def stage_files(seed: str, names: str) -> str:
    "Files of a seed's stages, as targets."
    return " ".join(f"{seed}/{name}" for name in names.split())


def artifact_cases() -> list[Case]:
    "What stages left in the store: all of it can be made again."
    seed = "study/seed-1"
    damaged = partial(cross, words=RUN, mended=True)
    files = partial(stage_files, seed)
    return [
        *damaged(
            "weights",
            files("base/model.safetensors mid/model.safetensors sft-help/model.safetensors"),
            "cut empty flip zeros huge gone",
        ),
        *damaged(
            "model files",
            files("mid/config.json mid/tokenizer.json sft-code/generation_config.json"),
            "cut flip other",
        ),
        *damaged("training rows", files("sft-code/rows.jsonl mid/held_out.jsonl"), "cut flip utf-16 gone"),
        *damaged("answers", files("answers-mid/answers.parquet"), "cut flip zeros empty other huge gone"),
        *damaged(
            "answers, used by the next stage",
            files("answers-mid/answers.parquet"),
            "flip zeros other",
            first=(f"{seed}/eval-mid",),
        ),
        *damaged(
            "weights, used by the next stage",
            files("mid/model.safetensors"),
            "flip zeros",
            first=(f"{seed}/answers-mid", f"{seed}/probe-mid"),
        ),
        *damaged(
            "grades and scores",
            files("eval-mid/grades.parquet eval-mid/scores.parquet"),
            "cut flip empty other",
        ),
        *damaged("margins", files("probe-mid/margin.parquet probe-mid/kl.parquet"), "cut flip other"),
        *damaged(
            "manifests",
            files("mid/manifest.json sft-code/manifest.json eval-mid/manifest.json"),
            "cut empty flip digit utf-16 other garbage gone",
        ),
        *benchmark_cases(partial(damaged, first=(f"{seed}/answers-mid", f"{seed}/eval-mid"))),
    ]


def benchmark_cases(damaged) -> list[Case]:
    "The study's copies of the benchmarks and their caches, under stages that read them again."
    copies = (
        "study/benchmarks/*/questions/train.jsonl study/benchmarks/*/dimensions/train.jsonl"
        " study/benchmarks/moru-*/train.jsonl"
    )
    return [
        *damaged("benchmark copies", copies, "cut flip empty other"),
        *damaged("benchmark caches", "study/benchmarks/arrow/*/*/*/*/*.arrow", "cut flip empty"),
    ]


def checkpoint_cases() -> list[Case]:
    """What a stage that was cut off left for the next run to carry on from; it may be passed over, never
    believed.
    """
    kept = "study/seed-1/.sft-help.checkpoints"
    targets = f"{kept}/checkpoint-*/* {kept}/*"
    return cross("checkpoints", targets, "cut flip zeros empty garbage gone", RUN, base="half", mended=True)


def table_cases() -> list[Case]:
    "The study's own tables and its configuration, under the commands that read them."
    report, claims = ("report", "{}/study"), ("claims", "{}/study")
    names = "study/answers.parquet study/grades.parquet study/scores.parquet"
    every = f"{names} study/margin.parquet study/kl.parquet"
    claim, setup = (
        partial(cross, "claims", "study/claims.json"),
        partial(cross, "study.yaml", "study/study.yaml"),
    )
    return [
        *cross("tables", every, "cut flip other", RUN, mended=True),
        *cross("tables", names, "cut flip zeros empty other", report, said=".parquet"),
        *claim("cut digit empty other utf-16 garbage gone", claims, said="claims"),
        *claim("cut digit", RUN, mended=True),
        *setup("cut empty flip digit utf-16 other garbage gone", RUN, said="study"),
        *setup("cut digit other garbage", report, said="study.yaml"),
    ]


# ---- what a user brings


def fresh(setting: str, *more: str) -> tuple[str, ...]:
    "A new study with a setting."
    return (*FRESH, *(word for one in (setting, *more) for word in ("--set", one)))


def row_cases() -> list[Case]:
    "Rows in three formats."
    hows = {
        "rows.jsonl": "cut empty utf-16 garbage other folder gone latin huge zeros",
        "rows.json": "cut empty utf-16 garbage other folder gone",
        "rows.parquet": "cut empty garbage other folder gone huge",
    }
    cases = []
    for name, how in hows.items():
        words = fresh(f"data.sft-help={{}}/{name}", "arms=[sft-help, sft-code]")
        cases += cross("data files", name, how, words, base="inputs", check="rows", said=name)
    return cases


def data_cases() -> list[Case]:
    "Rows, benchmarks and models that a user brings."
    refused = partial(cross, base="inputs", check="refused")
    benchmark, model = partial(refused, "benchmark folders"), partial(refused, "model folders")
    anima = dict(words=fresh("benchmarks.anima.data={}/mine"), said="mine")
    moru = dict(words=fresh("benchmarks.moru.data={}/moru"), said="moru")
    base = dict(words=fresh("models.base={}/model"), said="model")
    questions = "mine/questions/train.jsonl mine/dimensions/train.jsonl"
    return [
        *row_cases(),
        *benchmark(questions, "cut empty utf-16 garbage other gone latin", **anima),
        *benchmark("mine/README.md", "cut empty utf-16 gone other garbage", **anima),
        *benchmark("moru/train.jsonl moru_dims/train.jsonl", "cut empty other gone latin", **moru),
        *model("model/model.safetensors", "cut empty garbage gone other huge", **base),
        *model("model/config.json model/tokenizer.json", "cut empty garbage other gone", **base),
    ]


CONFIGURATION = (
    "sft.steps=many",
    "sft.steps=-1",
    "sft.steps=1e400",
    "sft.learning_rate=.nan",
    "sft.learning_rate=.inf",
    "sft=5",
    "sft=[1,2]",
    "sft",
    "=1",
    "models.base=",
    "arms=[sft-help, sft-help]",
    "arms=sft-hlep",
    "arms=[mid]",
    "generation.template=../../etc/passwd",
    "judge=",
    "judge=[1]",
    "benchmarks.anima.size={en: -3}",
    "benchmarks.anima.epochs=0",
    "lora.rank=99999999999999999999",
    "statistics.resamples=true",
    "threads=0",
    "data.sft-help=\x00",
    "data.documents=/proc/self/mem",
    "midtrain.rows=1" + "0" * 400,
    "models.base=" + "a/" * 3000,
    "name=../../outside",
    "benchmarks={../../outside: {task: anima, data: 'world:anima'}}",
)


def setting_case(setting: str) -> Case:
    "A value of `--set` that is wrong; the line must name its section, or the file that it names."
    shown = setting if len(setting) < 60 else f"{setting[:40]}..."
    said = "" if setting.startswith(("data.", "models.")) else setting.split("=")[0].split(".")[0]
    return Case("--set values", shown, "wrong", fresh(setting), base="inputs", check="refused", said=said)


def configuration_cases() -> list[Case]:
    "Settings on the command line, preset files, price tables."
    preset = ("run", "--preset", "{}/preset.yaml", "--out", "{}/new", "--no-report", "--no-reuse")
    priced = ("judge", "{}/evaluation", "--judge", "purse/other", "--prices", "{}/prices.yaml")
    damaged = partial(cross, check="refused")
    hows = "cut utf-16 other garbage empty gone folder"
    return [
        *map(setting_case, CONFIGURATION),
        *damaged("preset files", "preset.yaml", hows, preset, base="inputs", said="preset"),
        *damaged(
            "price tables",
            "prices.yaml",
            "utf-16 other garbage gone folder",
            priced,
            base="evaluation",
            said="prices.yaml",
        ),
    ]


# ---- what an evaluation left


def evaluation_cases() -> list[Case]:
    "An evaluation's files, the replies that were paid for, and the sheets that people filled in."
    again = ("judge", "{}/evaluation", *JUDGED)
    damaged = partial(cross, base="evaluation", check="evaluation")
    tables = "evaluation/answers.parquet evaluation/grades.parquet evaluation/scores.parquet"
    judges = "pass.json scores.parquet grades.parquet".split()
    passes = " ".join(f"evaluation/judges/*/{name}" for name in judges)
    return [
        *damaged(
            "evaluation setup",
            "evaluation/eval.yaml",
            "cut empty utf-16 other garbage digit",
            again,
            said="eval",
        ),
        *damaged(
            "evaluation answers",
            "evaluation/answers/*/*.parquet",
            "cut empty flip zeros other gone",
            ("eval", "world:base", *EVALUATE),
        ),
        *damaged("evaluation tables", tables, "cut flip other gone", again),
        *damaged("judges' passes", passes, "cut empty flip other gone", again),
        *reply_cases((*again, "--again")),
        *cross(
            "human grades",
            "sheet.csv sheet.key.csv",
            "cut empty utf-16 latin garbage other gone folder zeros",
            ("annotate", "{}/evaluation", "--read", "{}/sheet.csv"),
            base="evaluation",
            check="sheet",
            said="sheet",
        ),
    ]


def reply_cases(words: tuple[str, ...]) -> list[Case]:
    "The database of kept replies, damaged as a file, and with another grade in one reply."
    place = dict(base="evaluation", check="evaluation")
    replies = ("replies", "evaluation/judge-replies.sqlite")
    hows = "cut empty flip zeros garbage other gone huge folder"
    return [
        *cross(*replies, hows, words, **place),
        *(Case(*replies, f"grade {number}", words, **place) for number in (1, 2, 3)),
    ]


def all_cases() -> list[Case]:
    "Every case, in an order that is always the same."
    return [
        *artifact_cases(),
        *checkpoint_cases(),
        *table_cases(),
        *data_cases(),
        *configuration_cases(),
        *evaluation_cases(),
    ]
