"""Real cases: what other people's files do to the package, one line a case, the outcome wanted beside the
outcome seen.

A case makes its own small input, does what a user would do with it, and says in words what came of it. The
files
`test_real_*.py` hold the cases by topic and test them with `pytest.mark.parametrize(**table(CASES))`;
`python tests/cases.py` prints them all as a table.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from compassion_repro.core.errors import InputError


@dataclass(frozen=True)
class Case:
    "One input that somebody else made, and what should come of it."

    name: str  # kind of fault, and which of its siblings
    wanted: str  # regular expression that the outcome must match from its start: "refused: .*missing"
    act: Callable[[Path], object]  # makes the input in an empty folder, uses it, and returns what it saw


def outcome(
    case: Case,  # to be tried
    folder: Path,  # empty
    # "ok: ..." with what was seen, "refused: ..." with the one line, or the class and text of any other error
) -> str:
    "Try one case."
    try:
        return f"ok: {case.act(folder)}"
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever is no `InputError` is a fault, and is shown
        return f"{type(error).__name__}: {error}"


def problem(case: Case, folder: Path) -> str:  # empty where all is well
    "How a case comes out other than wanted, with both outcomes."
    seen = outcome(case, folder)
    if not re.match(case.wanted, seen, re.S):
        return f"{case.name}\n  wanted: {case.wanted}\n  seen:   {seen}"
    if seen.startswith("refused: ") and "\n" in seen:
        return f"{case.name}: a refusal is one line\n  seen: {seen}"
    return ""


def table(cases: list[Case]) -> dict:
    "Arguments of `pytest.mark.parametrize` for a list of cases."
    return dict(argnames="case", argvalues=cases, ids=[case.name.replace(" ", "-") for case in cases])


def main() -> int:
    """Print every case with its outcome; the exit status is the number of those that came out wrong, 100 at
    most.
    """
    wrong = 0
    for file in sorted(Path(__file__).parent.rglob("test_real_*.py")):
        sys.path.insert(0, str(file.parent))
        for case in import_module(file.stem).CASES:
            with tempfile.TemporaryDirectory() as folder:
                seen = outcome(case, Path(folder))
            right = re.match(case.wanted, seen, re.S) is not None
            wrong += not right
            print(
                f"{'right' if right else 'WRONG'} | {case.name} | wanted {case.wanted} | seen {seen[:200]}",
                flush=True,
            )
    print(f"{wrong} wrong")
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
