"""Check that export, clean and README rendering would change nothing.

Run by `make check`; works on a copy, so the checkout is never touched.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from readme import rendered

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("nbs", "compassion_repro", "README.md")


def differences(folder: Path) -> list[str]:
    "Files that differ between the checkout and its freshly exported, cleaned and rendered copy."
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "base")
    for name in ("nbs", "compassion_repro"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([command], cwd=folder, check=True, capture_output=True)
    (folder / "README.md").write_text(rendered(folder), encoding="utf-8")
    found = [path for part in PARTS for path in (folder / part, *(folder / part).rglob("*"))]
    files = [p.relative_to(folder) for p in found if p.is_file() and "__pycache__" not in p.parts]
    same = lambda f: (ROOT / f).exists() and (ROOT / f).read_bytes() == (folder / f).read_bytes()
    return [str(f) for f in files if not same(f)]


def main() -> int:
    "Print what differs; the exit status is 1 where something does."
    with tempfile.TemporaryDirectory() as folder:
        differ = differences(Path(folder))
    if differ:
        print("out of sync, run `make export` and commit:", *differ, sep="\n  ")
    else:
        print("in sync: modules, notebooks and README")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
