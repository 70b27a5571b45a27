"""Hold the declared requirements against what Colab has: would a plain `pip install` tear the session apart?

`python tools/colab_check.py` works offline, from settings.ini and from what the installed packages require
themselves; `--network` also asks pip for a dry run for Colab's Python, with the kept packages pinned.

It fails when torch, numpy, transformers or pandas would be replaced, and when any other package of Colab's
would be replaced without a reason in `REASONS`.
"""

import argparse
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
KEPT = ("torch", "numpy", "transformers", "pandas")  # never to be replaced under a running session
REASONS = {  # package of Colab's that is replaced -> what needs the newer one
    "datasets": "inspect-evals 0.26 requires 4.8.5, TRL 1.16 requires 4.7",
    "pyarrow": "TRL 1.16 and datasets 4.8.5 require 21",
    "huggingface-hub": "datasets above 4.8 requires 1.31; ours alone would keep it (1.27 is enough)",
    "rich": "textual, which inspect-ai requires, requires 14.2; ours alone would keep it",
}


def colab_versions(
    file: Path = ROOT / "tools" / "colab_versions.txt",  # lines name==version
) -> dict[str, str]:  # canonical name -> version
    "What Colab has."
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared(
    file: Path = ROOT / "settings.ini",  # as setup.py reads it
    extra: str = "judge",  # the extra that the Colab notebooks install
) -> list[Requirement]:  # of the package itself
    "What `pip install compassion_repro[judge]` asks for."
    config = ConfigParser(delimiters=["="])
    config.read(file, encoding="utf-8")
    section = config["DEFAULT"]
    words = section["requirements"].split() + (section[f"{extra}_requirements"].split() if extra else [])
    return [Requirement(word) for word in words]


def required_by(name: str) -> list[Requirement]:
    """What an installed package requires on Colab's Python, extras aside; nothing for one that is not
    installed.
    """
    version = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    python = {**default_environment(), **version, "extra": ""}
    try:
        found = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return []
    return [need for need in found if need.marker is None or need.marker.evaluate(python)]


def replaced(
    needed: list[Requirement],  # from `declared`
    there: dict[str, str],  # from `colab_versions`
    needs=required_by,  # gives a package's own requirements
) -> dict[str, list[str]]:  # Colab's package -> who asks for another version
    """Colab's packages that an install would replace: asked for by us, or by what has to be installed or
    replaced.
    """
    found, seen = {}, set()
    waiting = [(need, "compassion_repro") for need in needed]
    while waiting:
        need, by = waiting.pop()
        name = canonicalize_name(need.name)
        if name in there:
            if need.specifier.contains(there[name], prereleases=True):
                continue
            found.setdefault(name, []).append(f"{by} requires {need.name}{need.specifier}")
        if name in seen:
            continue
        seen.add(name)
        waiting += [(deeper, need.name) for deeper in needs(need.name)]
    return found


def faults(
    found: dict[str, list[str]],  # from `replaced`
    there: dict[str, str],  # from `colab_versions`
) -> list[str]:  # one line each
    "What is wrong: a package that must be kept, or one without a reason."
    lines = []
    for name, why in sorted(found.items()):
        if name in KEPT:
            lines.append(f"{name} {there[name]} would be replaced under a running session: {'; '.join(why)}")
        elif name not in REASONS:
            lines.append(
                f"{name} {there[name]} would be replaced: {'; '.join(why)}: lower it or give a reason"
            )
    return lines


def dry_run(there: dict[str, str]) -> list[str]:
    """pip's own answer for Colab's Python with the kept packages pinned; nothing is installed.

    Needs the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("".join(f"{name}=={there[name]}\n" for name in KEPT), encoding="utf-8")
        options = (
            f"--dry-run --quiet --ignore-installed --python-version {PYTHON} --only-binary :all:".split()
        )
        places = ["--target", folder, "-c", str(pins)]
        command = [sys.executable, "-m", "pip", "install", *options, *places, *map(str, declared())]
        done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return []
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if any(word in done.stderr for word in ("ResolutionImpossible", "No matching distribution")):
        return [f"pip finds no set of packages that keeps {', '.join(KEPT)}: {last}"]
    print(f"pip could not be asked, so only the declared requirements were looked at: {last}")
    return []


def main(words: list[str] | None = None) -> int:
    "Print what would be replaced and why; the exit status is 1 where something is wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="store_true", help="also ask pip for a dry run")
    args = parser.parse_args(words)
    there = colab_versions()
    found = replaced(declared(), there)
    for name in sorted(set(found) & set(REASONS)):
        print(f"{name} {there[name]} is replaced on Colab: {REASONS[name]}")
    wrong = faults(found, there) + (dry_run(there) if args.network else [])
    for line in wrong:
        print(f"wrong: {line}")
    if not wrong:
        print(
            f"Colab keeps its {', '.join(KEPT)}: {len(there) - len(found)} of {len(there)} packages stay as"
            " they are"
        )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
