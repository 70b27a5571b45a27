"""Makes the documentation site from the notebooks: `python tools/docs.py` writes build/site (`make docs`).

Each notebook becomes a page of Markdown (nbconvert), its figures files next to it; mkdocs lays the pages out
and, being strict, fails on a link or an anchor that leads nowhere. Needs `pip install -e '.[docs]'`.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE, CONFIG = "build/docs", "build/site", "build/mkdocs.yml"
FIRST = (
    "index",
    "plain_version",
    "reproduce_tiny",
    "reproduce_pocket",
    "your_study",
    "colab_qlora",
    "colab_evaluate",
    "bench",
)
TEXTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")  # pages that are no notebooks
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.MULTILINE)
STYLE = """.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset img { background: white; }  /* figures with a transparent ground, in the dark */
.md-typeset .output pre { border-left: .15rem solid var(--md-default-fg-color--lighter); }
.md-grid { max-width: 72rem; }
"""


def shown(
    notebook: nbformat.NotebookNode,  # as it is in the repository
) -> nbformat.NotebookNode:  # without hidden cells, and without lines that are for nbdev
    "A notebook as readers see it."
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if not HIDDEN.search(cell.source)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip()
    return notebook


def anchor(
    name: str,  # as Jupyter has it: `#Equal-dose`, or empty
) -> str:
    "The anchor of a heading as mkdocs has it."
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s#-]", "", name).lower())


def linked(
    text: str,  # Markdown of a page
) -> str:
    "The same with links to pages in place of notebooks, and to figures as they are copied."

    def link(found: re.Match) -> str:
        "A link to a notebook, or to a heading of this page."
        page = found[1].removesuffix(".ipynb") + ".md" if found[1] else ""
        return f"]({page}{anchor(found[2] or '')})"

    pages = re.sub(r"\]\(([^):#]+\.ipynb|)(#[^)]+)?\)", link, text)
    return pages.replace("](../figures/", "](figures/")


def write_page(
    file: Path,  # a notebook
    pages: Path,  # folder of all pages
    source: Path,  # folder of all notebooks
) -> str:  # title of the page
    "Write the page of a notebook, and its figures into a folder next to it."
    place = (pages / file.relative_to(source)).with_suffix(".md")
    place.parent.mkdir(parents=True, exist_ok=True)
    notebook = shown(nbformat.read(file, as_version=4))
    resources = {"output_files_dir": f"{file.stem}_files"}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources)
    place.write_text(linked(text), encoding="utf-8")
    for name, data in found["outputs"].items():
        (place.parent / name).parent.mkdir(exist_ok=True)
        (place.parent / name).write_bytes(data)
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return heading[1].replace("`", "") if heading else file.stem


def write_pages(
    root: Path = ROOT,  # a checkout
) -> list[dict]:  # what mkdocs calls `nav`
    "Write all pages anew; returns the order in which they are read."
    pages, source = root / PAGES, root / "nbs"
    shutil.rmtree(pages, ignore_errors=True)
    files = sorted(file for file in source.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts)
    titles = {str(f.relative_to(source).with_suffix(".md")): write_page(f, pages, source) for f in files}
    shutil.copytree(root / "figures", pages / "figures")
    (pages / "site.css").write_text(STYLE, encoding="utf-8")
    for name in TEXTS:
        shutil.copy(root / name, pages / name)
    return navigation(titles)


def navigation(
    titles: dict[str, str],  # page to title
) -> list[dict]:
    "Walkthroughs first, then a section for each package in reading order, then the texts about the project."
    chapters: dict[str, list] = {}
    for page, title in titles.items():
        folder = page.rpartition("/")[0]
        if folder:
            chapters.setdefault(re.sub(r"^\d+_", "", folder), []).append({title: page})
    first = [{titles[f"{name}.md"]: f"{name}.md"} for name in FIRST if f"{name}.md" in titles]
    texts = [{name.removesuffix(".md").capitalize(): name} for name in TEXTS]
    return [{"start": first}, *({name: pages} for name, pages in chapters.items()), {"project": texts}]


def build(
    root: Path = ROOT,  # a checkout
) -> int:  # mkdocs' exit status; not 0 where a link leads nowhere
    "Write the pages and lay them out as a site."
    config = {"INHERIT": "../mkdocs.yml", "docs_dir": "docs", "site_dir": "site", "nav": write_pages(root)}
    config["hooks"] = [str(root / "tools" / "docs_math.py")]
    (root / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    words = ["mkdocs", "build", "--strict", "--config-file", str(root / CONFIG)]
    return subprocess.run([sys.executable, "-m", *words], cwd=root).returncode


if __name__ == "__main__":
    sys.exit(build())
