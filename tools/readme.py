"""Renders README.md from `nbs/index.ipynb`: `python tools/readme.py` writes it."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RENDER = "jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb"


def rendered(
    folder: Path,  # a checkout
) -> str:  # Markdown, with links that start at the checkout in place of `nbs/`
    "The index notebook as the text of README.md."
    text = subprocess.run(RENDER.split(), cwd=folder, check=True, capture_output=True, text=True).stdout
    return re.sub(r"\]\(([^):]+\.ipynb(?:#[^)]*)?)\)", r"](nbs/\1)", text.replace("../figures/", "figures/"))


if __name__ == "__main__":
    (ROOT / "README.md").write_text(rendered(ROOT), encoding="utf-8")
