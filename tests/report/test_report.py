"""The report of a study: made without torch from the scores, self-contained, escaped, laid out in a real
browser at desktop and phone width; bad input in one line.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import BROWSER, Page
from conftest import assert_one_line, copy_study

from compassion_repro import cli
from compassion_repro.core.files import read_sealed, write_sealed
from compassion_repro.report import page as report
from compassion_repro.report.answer import answer
from compassion_repro.report.pictures import pictures
from compassion_repro.stats.claims import read_claims

HOSTILE = (
    "<script>window.planted = 1; document.title = 'planted'</script><img src=x onerror='window.planted ="
    " 2'>{{ 7 * 7 }}"
)
WITHOUT_TORCH = """
import sys
class Absent:
    "As if the heavy libraries were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "trl", "datasets", "inspect_ai", "peft"): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from compassion_repro.cli import main
sys.exit(main(["report", sys.argv[1]]))
"""


def enrich(study: Path):
    """Give a finished study what the crash-test size leaves out: a GRPO arm, a second judge, margins, KL, an
    answer that is an attack.
    """
    draw = np.random.default_rng(0)
    (study / "record.json").unlink()
    tables = {name: pd.read_parquet(study / f"{name}.parquet") for name in ("answers", "grades", "scores")}
    for name, table in tables.items():
        table = pd.concat(
            [table, table[table["model"] == "sft-help"].assign(model="grpo-help")], ignore_index=True
        )
        if name != "answers":
            table = pd.concat(
                [
                    table,
                    table.assign(
                        judge="strict",
                        **{
                            "grade" if name == "grades" else "score": (
                                lambda own: (
                                    own.iloc[:, own.columns.get_loc("grade" if name == "grades" else "score")]
                                    * draw.integers(0, 2, len(own))
                                )
                            )
                        },
                    ),
                ],
                ignore_index=True,
            )
        if name == "answers":
            table["text"] = HOSTILE + table["text"]
        if name == "grades":
            table["reply"], table.loc[table.index[:40], "grade"] = HOSTILE + table["reply"], np.nan
        table.to_parquet(study / f"{name}.parquet")
    pairs = pd.DataFrame(
        [
            (model, 1, language, "Actionability", f"{language}{n}", "world", n % 3 == 0, draw.normal())
            for model in ("base", "mid", "sft-help")
            for language in ("en", "es")
            for n in range(12)
        ],
        columns=["model", "seed", "language", "dimension", "pair_id", "source", "held_out", "margin"],
    )
    pairs.to_parquet(study / "margin.parquet")
    pd.DataFrame(
        [
            (model, 1, "anima", "en", "q", kl, 20)
            for model, kl in (("mid", 0.0), ("sft-help", 0.2), ("sft-code", 0.1))
        ],
        columns=["model", "seed", "benchmark", "language", "question_id", "kl", "tokens"],
    ).to_parquet(study / "kl.parquet")
    place = study / "seed-1" / "grpo-help"
    place.mkdir()
    log = [
        {"step": step, "reward": 0.1 * step, "kl": 0.01 * step, "length": 20 + step, "abstained": 0.125}
        for step in range(1, 9)
    ]
    manifest = {
        **read_sealed(study / "seed-1" / "sft-help" / "manifest.json"),
        "stage": "grpo-help",
        "kind": "grpo",
        "model": "grpo-help",
    }
    manifest["result"] = {
        "rows": 60,
        "steps": 8,
        "completions": 64,
        "reward_before": 0.1,
        "reward_after": 0.1,
        "gain": 0.0,
        "gain_low": -0.1,
        "gain_high": 0.1,
        "trained": False,
        "warnings": ["the answers do not end"],
        "log": log,
    }
    write_sealed(place / "manifest.json", manifest)
    pd.DataFrame(
        {
            "step": [1, 1, 8],
            "prompt": "Write a function.",
            "completion": [HOSTILE, "pass", "return 1"],
            "reward": [0.0, 0.5, 1.0],
            "advantage": 0.0,
        }
    ).to_parquet(place / "completions.parquet")


@pytest.fixture(scope="module")
def rich(finished, tmp_path_factory) -> Path:
    "A study with every part, reported by a process that has no torch."
    study = copy_study(finished, tmp_path_factory.mktemp("rich") / "study")
    enrich(study)
    for name in ("claims.json", "report.html"):
        (study / name).unlink()
    shutil.rmtree(study / "figures")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, study], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (study.parent / "said.txt").write_text(done.stdout)
    return study


class Tags(HTMLParser):
    "Every tag of a page with its attributes, and its text."

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(rich) -> Tags:
    return Tags((rich / "report.html").read_text(encoding="utf-8"))


def test_a_run_leaves_a_report(finished):
    assert "report.html" in (finished.parent / "stdout.txt").read_text()
    page = Tags((finished / "report.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "about the miniature world of this package, not about Llama" in text
    assert "One training seed: the verdicts are about these checkpoints" in text
    links = [anchor["href"] for anchor in page.all("a") if "127.0.0.1" in anchor["href"]]
    for link in links:
        assert (finished / link.partition("#/logs/")[2].partition("/samples/")[0]).is_file(), link
    assert links and "inspect view --log-dir ." in text


@pytest.mark.long
def test_everything_is_computed_again_without_torch(rich):
    records = json.loads((rich / "claims.json").read_text())
    assert {r["judge"] for r in records} == {"indicator", "strict", "mean of judges", "no judge"} and any(
        r["verdict"] != "not tested" for r in records
    )
    assert {p.name for p in (rich / "figures").iterdir()} == {
        f"{name}.{kind}" for name in pictures() for kind in ("png", "svg")
    }
    assert (
        "C1" in (rich.parent / "said.txt").read_text()
        and "report.html" in (rich.parent / "said.txt").read_text()
    )


def test_the_page_needs_nothing_from_elsewhere(rich, page):
    assert page.all("script") == [{}] and not page.all("iframe")  # ours, which the policy names
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    policy = page.all("meta")[2]["content"]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert len(page.all("img")) == len(pictures())
    for image in page.all("img"):
        assert (
            image["src"].startswith("data:image/svg+xml;base64,")
            and len(image["alt"]) > 20
            and int(image["width"]) > 200
        )
    begins = ("#", "data:text/csv;base64,", "http://127.0.0.1:7575/#/logs/")  # the last: Inspect's viewer
    assert all(anchor["href"].startswith(begins) for anchor in page.all("a"))
    assert "@import" not in "".join(page.text) and "url(" not in "".join(page.text)
    assert (rich / "report.html").stat().st_size < 5 * 2**20


def test_the_page_can_be_found_ones_way_in(page):
    ids = [section["id"] for section in page.all("section")]
    anchors = [anchor["href"] for anchor in page.all("a")]
    assert [href[1:] for href in anchors if href[0] == "#"] == ids
    assert ids == [name for name in report.SECTIONS if name != "tradeoff"]  # no points of arms here
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[1]["name"] == "viewport"
    boxes = [box for box in page.all("div") if "scroll" in (box.get("class") or "").split()]
    # they can be scrolled from the keyboard
    assert len(boxes) >= 10 and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_every_figure_and_table_gives_its_numbers(rich, page):
    tables = {
        anchor["download"].removeprefix(f"{rich.name}-"): pd.read_csv(
            io.BytesIO(base64.b64decode(anchor["href"].partition(",")[2]))
        )
        for anchor in page.all("a")
        if "download" in anchor
    }
    assert {f"figure-{name}.csv" for name in pictures()} <= set(tables)
    assert len(tables["figure-margin.csv"]) == 72 and all(map(len, tables.values()))
    claims = json.loads((rich / "claims.json").read_text())
    general = [record for record in claims if (record["family"] or "").startswith("general")]
    assert len(tables["claims.csv"]) == len(claims) - len(general) and len(tables["general.csv"]) == len(
        general
    )
    assert set(tables["general-summary.csv"]["measured on"]) >= {"anima (indicator)", "anima (strict)"}
    assert claims[-len(general) :] == general  # the paper's claims come first
    assert {"judge", "no judge"} == set(tables["kept.csv"]["by"])


def test_the_first_screen_answers(rich, page):
    said = answer(read_claims(rich / "claims.json"))
    text = " ".join("".join(page.text).split())
    first = text[: text.index("The claims")]
    for words in (said.headline, said.reason, *said.found, said.level, said.scope):
        assert words in first, words
    assert "What each arm keeps" in first and first.count("by the judge") >= 2
    titles = [title for title, _ in page.tags if title == "title"]
    assert len(titles) > 2  # the marks of the figure explain themselves


def test_every_claim_is_a_row_and_terms_explain_themselves(page):
    rows = "".join(page.text)
    heads = [attributes for tag, attributes in page.tags if tag == "tbody"]
    assert all(f"C{n} " in rows for n in range(1, 9)) and len(heads) > 9
    meanings = {div["id"] for div in page.all("div") if "popover" in div}
    asked = {button["popovertarget"] for button in page.all("button")}
    assert asked <= meanings and {"term-sft", "term-judge"} <= asked
    assert all(len(button["title"]) > 20 for button in page.all("button"))
    assert "compassion-repro run --preset smoke" in rows  # what to run for what was not tested


def test_what_models_and_judges_say_is_escaped(rich, page):
    text = "".join(page.text)
    assert text.count(HOSTILE[:30]) > 20 and "{{ 7 * 7 }}" in text and "onerror" not in str(page.tags)


def test_limitations_are_those_of_the_study(page):
    text = " ".join("".join(page.text).split())
    for part in (
        "One training seed",
        "GRPO helpfulness, seed 1: the answers do not end.",
        "the reward abstained on 12 % of the completions",
        "GRPO helpfulness (seed 1)",
        "% of the grades of indicator are missing",
        "Agreement between judges",
        "other than MORU",
        "settings are not given by the paper",
    ):
        assert part in text, part
    assert (
        "One judge" not in text and "There is no judge-free margin" not in text and "No GRPO arm" not in text
    )


def test_parts_that_are_missing_are_said_to_be(study_copy):
    for name in ("answers.parquet", "grades.parquet", "margin.parquet", "kl.parquet"):
        (study_copy / name).unlink()
    for place in study_copy.glob("seed-*"):
        shutil.rmtree(place)
    assert cli.main(["report", str(study_copy)]) == 0
    text = (study_copy / "report.html").read_text(encoding="utf-8")
    for part in (
        "the study keeps no answers",
        "The study keeps no grades",
        "No stage of this study trained a model",
        "no GRPO arm to draw",
        "no training to draw",
        "the study keeps no judge-free margin",
    ):
        assert part in text, part
    assert text.count("<img") == 6 and not (study_copy / "figures" / "training.png").exists()


def damage(study: Path, how: str):
    "Spoil a finished study in one way."
    scores = study / "scores.parquet"
    if how.startswith("scores of"):
        (study / "record.json").unlink()  # a table that somebody put there
    if how == "no study":
        (study / "study.yaml").unlink()
    if how == "half a study":
        [(study / f"{name}.parquet").unlink() for name in ("scores", "grades", "answers")]
    if how == "truncated scores":
        scores.write_bytes(scores.read_bytes()[:2000])
    if how == "scores of another study":
        pd.read_parquet(scores).assign(study="elsewhere").to_parquet(scores)
    if how == "scores of a namesake":
        pd.read_parquet(scores).replace({"model": {"sft-code": "grpo-code"}}).to_parquet(scores)
    if how == "scores of something else":
        pd.DataFrame({"a": [1]}).to_parquet(scores)
    if how == "truncated answers":
        (study / "answers.parquet").write_bytes(b"PAR1")
    if how == "damaged settings":
        (study / "study.yaml").write_text("{ not yaml: [")
    if how == "figures in the way":
        shutil.rmtree(study / "figures")
        (study / "figures").write_text("a file")


@pytest.mark.parametrize(
    "how, said",
    [
        ("no study", "is not a study folder"),
        ("half a study", "finish it with"),
        ("truncated scores", "is damaged"),
        ("scores of another study", "belongs to the study 'elsewhere'"),
        ("scores of a namesake", "grpo-code, seed 1, which this study never made"),
        ("scores of something else", "lacks the columns"),
        ("truncated answers", "is damaged"),
        ("damaged settings", "is damaged or was edited by hand"),
        ("figures in the way", "cannot write"),
    ],
)
def test_bad_input_is_one_line(study_copy, capsys, how, said):
    before = (study_copy / "report.html").read_bytes()
    damage(study_copy, how)
    status = cli.main(["report", str(study_copy)])
    assert_one_line(types.SimpleNamespace(returncode=status, stderr=capsys.readouterr().err), said)
    assert (study_copy / "report.html").read_bytes() == before  # what stood there stays


def test_no_folder_is_one_line(capsys):
    status = cli.main(["report", "nowhere"])
    assert_one_line(
        types.SimpleNamespace(returncode=status, stderr=capsys.readouterr().err),
        "nowhere is not a study folder",
    )


CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c) && c !== 'transparent') return c } return 'rgb(255, 255, 255)' };
  const worst = {};
  for (const e of document.querySelectorAll('p, li, td, th, a, h1, h2, h3, h4, .verdict, .pass, .fail, .none, summary')) {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) worst[e.tagName + '.' + e.className] = ratio }
  return worst })()"""


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine: apt-get install chromium")
def test_the_page_in_a_browser(rich, tmp_path):
    with Page(tmp_path / "profile") as browser:
        for width, dark in ((1280, False), (390, False), (390, True)):
            browser.open(rich / "report.html", width, dark=dark)
            assert browser.evaluate(
                "[...document.images].every(i => i.complete && i.naturalWidth > 100) &&"
                " document.images.length"
            ) == len(pictures())
            # no page that scrolls sideways
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            outside = browser.evaluate(
                "[...document.querySelectorAll('main *, header *, nav *')].filter(e => !e.closest('.scroll')"
                " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' +"
                " e.className)"
            )
            assert outside == [], outside
            assert browser.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
            assert browser.evaluate(CONTRAST) == {}
            assert browser.evaluate("window.planted === undefined && !document.title.includes('planted')")
            assert browser.trouble == [], browser.trouble
            shot = browser.screenshot(tmp_path / f"report-{width}{'-dark' * dark}.png")
            assert shot.stat().st_size > 20_000
        browser.open(rich / "report.html", 390)
        wide = (
            "[...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth + 1).length"
        )
        # wide tables and figures scroll in their own box
        assert (
            browser.evaluate(wide) >= 5
            and browser.evaluate(
                "(() => { const b = document.querySelector('#figure-scores .picture'); b.scrollLeft = 99; return"
                " b.scrollLeft })()"
            )
            == 99
        )


SHOWN = """(() => {
  const visible = [...document.querySelectorAll('.sample:not([hidden]) .answer:not([hidden])')];
  return [...new Set(visible.map(e => e.dataset.model))] })()"""


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine: apt-get install chromium")
def test_answers_are_filtered_and_terms_open(rich, tmp_path):
    def choose(name, value):
        return (
            f"(() => {{ const e = document.querySelector('.filter [name={name}]'); e.value = '{value}';"
            " e.dispatchEvent(new Event('input', {bubbles: true})); return"
            " document.querySelector('.filter output').textContent })()"
        )

    with Page(tmp_path / "profile") as browser:
        browser.open(rich / "report.html", 390)
        everything = browser.evaluate(choose("words", ""))
        assert len(browser.evaluate(SHOWN)) > 3
        browser.evaluate(choose("model", "mid-trained"))
        assert browser.evaluate(SHOWN) == ["mid-trained"]
        only = browser.evaluate(choose("benchmark", "MORU"))
        assert only != everything and not only.startswith("0 ")
        assert browser.evaluate(choose("words", "no answer says this")).startswith("0 of ")
        term = "document.querySelector('.lead .term')"
        browser.evaluate(f"{term}.click()")
        opened = f"document.getElementById({term}.getAttribute('popovertarget')).matches(':popover-open')"
        assert browser.evaluate(opened) and browser.trouble == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine: apt-get install chromium")
def test_the_browser_would_tell(tmp_path):
    "The checks above fail on a page that has the faults."
    (tmp_path / "bad.html").write_text(
        "<img src='missing.png'><div style='width: 900px; color: #ccc'><p>wide and"
        " pale</p></div><script>window.planted = 1; console.error('x')</script>"
    )
    with Page(tmp_path / "profile") as browser:
        browser.open(tmp_path / "bad.html", 390)
        assert (
            browser.evaluate("document.documentElement.scrollWidth") > 390
            and browser.evaluate(CONTRAST) != {}
        )
        assert (
            browser.evaluate("document.images[0].naturalWidth") == 0
            and browser.evaluate("window.planted") == 1
        )
        assert {message["method"] for message in browser.trouble} >= {
            "Runtime.consoleAPICalled",
            "Network.loadingFailed",
        } or any("missing.png" in str(m) for m in browser.trouble)
