"""How dense the code is, by folder: `python tests/style.py`. Figures to read, no test.

For each folder of the package: lines; conditional expressions, nested comprehensions, assignment expressions and
lambdas in a thousand lines; comments in a hundred lines.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ecodiff"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def counted(path: Path) -> Counter:
    """What one file has."""
    text = path.read_text(encoding="utf-8")
    found = Counter(lines=len(text.splitlines()))
    for node in ast.walk(ast.parse(text)):
        found["conditional"] += isinstance(node, ast.IfExp)
        found["walrus"] += isinstance(node, ast.NamedExpr)
        found["lambda"] += isinstance(node, ast.Lambda)
        if isinstance(node, COMPREHENSIONS):
            loops_inside = any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node)
            found["nested"] += loops_inside or len(node.generators) > 1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found["comments"] += token.type == tokenize.COMMENT
    return found


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    depth = 2 if parts[0] == "lab" else 1
    return "/".join(parts[:depth]) if len(parts) > depth else "/".join(parts[: len(parts) - 1]) or "."


def main() -> None:
    folders: dict[str, Counter] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        folders.setdefault(folder_of(path), Counter()).update(counted(path))
    total = sum(folders.values(), Counter())
    heads = ("lines", "conditional", "nested", "walrus", "lambda", "comments")
    print(f"{'':18}" + "".join(f"{head:>13}" for head in heads))
    for name, found in [*folders.items(), ("all", total)]:
        shares = [1000 * found[head] / found["lines"] for head in heads[1:-1]]
        shares.append(100 * found["comments"] / found["lines"])
        print(f"{name:18}{found['lines']:13}" + "".join(f"{share:13.1f}" for share in shares))


if __name__ == "__main__":
    main()
