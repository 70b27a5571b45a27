"""The documentation site: pages from notebooks, links that lead somewhere, equations without a foreign script,
and the whole of it in a browser. What needs mkdocs is skipped where the extra `docs` is not installed.
"""

import importlib.util
import json
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import docs  # noqa: E402
from browser import BROWSER, Page  # noqa: E402

MISSING = [name for name in ("mkdocs", "material", "latex2mathml") if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason="the site's packages are not installed: extra docs")
FIGURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def small_checkout(folder: Path, link: str = "01_study/00_study.ipynb#One-section:") -> Path:
    "A checkout of two notebooks, of which the first links into the second."
    (folder / "nbs" / "01_study").mkdir(parents=True)
    chapter = nbformat.v4.new_notebook()
    figure = nbformat.v4.new_output("display_data", data={"image/png": FIGURE, "text/plain": "<Figure>"})
    chapter.cells = [
        nbformat.v4.new_markdown_cell(
            "# A `chapter`\n\n## One section:\n\n$$a_i = \\frac{b}{2}$$\n\nand $c < d$"
        ),
        nbformat.v4.new_code_cell("#| default_exp study"),
        nbformat.v4.new_code_cell("#| hide\nsecret = 1"),
        nbformat.v4.new_code_cell("#| export\ndef shown(): return 1", outputs=[figure]),
    ]
    index = nbformat.v4.new_notebook()
    index.cells = [nbformat.v4.new_markdown_cell(f"# Start\n\n[go]({link}) ![f](../figures/f.png)")]
    nbformat.write(chapter, folder / "nbs" / "01_study" / "00_study.ipynb")
    nbformat.write(index, folder / "nbs" / "index.ipynb")
    (folder / "figures").mkdir()
    shutil.copy(ROOT / "figures" / "scores.png", folder / "figures" / "f.png")
    for name in (*docs.TEXTS, "mkdocs.yml"):
        (folder / name).write_text("# Text\n" if name.endswith(".md") else (ROOT / name).read_text())
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_notebook_becomes_a_page(tmp_path):
    nav = docs.write_pages(small_checkout(tmp_path))
    assert nav[:2] == [{"start": [{"Start": "index.md"}]}, {"study": [{"A chapter": "01_study/00_study.md"}]}]
    page = (tmp_path / docs.PAGES / "01_study" / "00_study.md").read_text()
    assert "```python\ndef shown(): return 1\n```" in page and "#|" not in page
    assert "secret" not in page
    (figure,) = (tmp_path / docs.PAGES / "01_study" / "00_study_files").glob("*.png")
    assert f"(00_study_files/{figure.name})" in page
    start = (tmp_path / docs.PAGES / "index.md").read_text()
    assert "(01_study/00_study.md#one-section)" in start and "(figures/f.png)" in start


@needs_mkdocs
@pytest.mark.parametrize("link", ["01_study/09_gone.ipynb", "01_study/00_study.ipynb#no-section"])
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path, link, capfd):
    assert docs.build(small_checkout(tmp_path, link)) != 0
    assert link.partition("/")[2].replace(".ipynb", "") in capfd.readouterr().err.replace(".md", "")


@needs_mkdocs
def test_equations_are_drawn_without_a_script(tmp_path):
    assert docs.build(small_checkout(tmp_path)) == 0
    page = (tmp_path / docs.SITE / "01_study" / "00_study.html").read_text()
    assert page.count("<math ") == 2 and 'display="block"' in page and "<mfrac>" in page
    assert "arithmatex" not in page and "MathJax" not in page


@contextmanager
def served(folder: Path):
    "The address of a folder on this machine."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_mkdocs
@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine: apt-get install chromium")
def test_the_site_in_a_browser(tmp_path):
    for name in ("nbs", "figures", "tools", "mkdocs.yml", *docs.TEXTS):
        (tmp_path / name).symlink_to(ROOT / name)
    assert docs.build(tmp_path) == 0
    (tmp_path / "profile").mkdir()
    with served(tmp_path / docs.SITE) as site, Page(tmp_path / "profile") as browser:
        for page, width in (("index", 1280), ("06_stats/00_inference", 1280), ("reproduce_tiny", 390)):
            browser.open(f"{site}/{page}.html", width, dark=page == "index")
            assert not browser.trouble, json.dumps(browser.trouble)[:500]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            images = (
                "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
            )
            assert browser.evaluate(images) == []
            fetched = browser.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
            assert fetched and all(address.startswith(site) for address in fetched), fetched
