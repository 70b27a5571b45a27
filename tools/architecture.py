"""The package's layers, read from its imports: `python tools/architecture.py` checks them and compares
ARCHITECTURE.md, `--write` writes it anew.

A module may import from a lower layer and, within its package, from whatever does not lead back to it.
Imports inside functions count as well. Exit status 1 where a module imports upward, where imports go in a
circle, or where the page is out of date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "compassion_repro"
PAGE = ROOT / "ARCHITECTURE.md"
LAYERS = [  # lowest first; those of one line may not import each other
    ("core",),
    ("sections",),
    ("arms",),
    ("study",),
    ("presets",),
    ("preset_file",),
    ("data", "sandbox", "paper"),
    ("training",),
    ("evaluation",),
    ("stats",),
    ("store",),
    ("report",),
    ("bench", "pipeline"),
    ("cli",),
]
INTRODUCTION = (
    "Made by `python tools/architecture.py --write` from the imports. A module imports only from"
    " layers above it in this list, and from its own package."
)
UNLISTED = ("__init__.py", "_modidx.py")
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    "Exported modules by their dotted name within the package."
    folder = ROOT / PACKAGE
    paths = [path for path in sorted(folder.rglob("*.py")) if path.name not in UNLISTED]
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}


def imports_of(
    module: str,  # dotted name
    path: Path,  # its file
    known: dict[str, Path],  # from `modules`
) -> dict[str, bool]:  # imported module -> whether it is imported at the top, not inside a function
    "The package's own modules that one imports."
    found: dict[str, bool] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        here = [PACKAGE, *module.split(".")]
        parts = here[: len(here) - node.level] if node.level else []
        parts += node.module.split(".") if node.module else []
        if parts[:1] != [PACKAGE]:
            continue
        for alias in node.names:
            for name in (".".join([*parts[1:], alias.name]), ".".join(parts[1:])):
                if name in known:
                    found[name] = found.get(name, False) or id(node) in top
                    break
    return found


def layer(module: str) -> str:
    "The package that a module belongs to, or its own name at the top."
    return module.split(".")[0]


def upward(graph: dict[str, dict[str, bool]]) -> list[str]:
    "Imports of a higher layer, or of another one in the same line."
    return [
        f"{module} imports {other}, which is"
        f" {'not below it' if RANK[layer(other)] == RANK[layer(module)] else 'above it'}"
        for module, others in graph.items()
        for other in others
        if layer(other) != layer(module) and RANK[layer(other)] >= RANK[layer(module)]
    ]


def circles(graph: dict[str, dict[str, bool]]) -> list[str]:
    "Imports that lead back, one line a circle."
    found, done = [], set()

    def follow(module: str, path: list[str]):
        "Depth first; a module whose imports were all followed is not entered again."
        if module in path:
            found.append("a circle: " + " -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in graph[module]:
                follow(other, [*path, module])
            done.add(module)

    for module in graph:
        follow(module, [])
    return found


def described(path: Path) -> str:
    "The first line of a module's docstring."
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def page(known: dict[str, Path], graph: dict[str, dict[str, bool]]) -> str:
    "The page: a table of the modules of each layer, lowest first, with what each imports."
    lines = ["# Architecture", "", INTRODUCTION]
    for name in RANK:
        lines += ["", f"## {name}", "", "| module | what it gives you | imports |", "|---|---|---|"]
        for module in (module for module in known if layer(module) == name):
            others = [f"`{other}`" if top else f"(`{other}`)" for other, top in sorted(graph[module].items())]
            text = described(known[module]).replace("|", r"\|")
            lines.append(f"| `{module}` | {text} | {', '.join(others)} |")
    return "\n".join([*lines, "", "In brackets: imported inside a function, when it is needed.", ""])


def main() -> int:
    "Check the imports and the page, or write the page; the exit status is 1 where something is wrong."
    known = modules()
    graph = {module: imports_of(module, path, known) for module, path in known.items()}
    wrong = [f"{module}: its layer is not in LAYERS" for module in known if layer(module) not in RANK]
    wrong = wrong or upward(graph) + circles(graph)
    text = page(known, graph)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        wrong.append("ARCHITECTURE.md is out of date: python tools/architecture.py --write")
    print("\n".join(wrong) or f"{len(known)} modules, no import upward, no circle")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
