"""Every module, and every public class, function and method, says what it is."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Pages that tell of what was, or of what somebody is to write.
UNBOUND = ("CHANGELOG.md", "devices.md")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def undocumented(tree, qualified="module"):
    """Public names without a docstring below ``tree``: (name, line).

    Methods of a class with bases are left out: what they do is said where they are declared.
    """
    if ast.get_docstring(tree) is None:
        yield qualified, getattr(tree, "lineno", 1)
    if isinstance(tree, FUNCTIONS):
        return
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, *FUNCTIONS)) or node.name.startswith("_"):
            continue
        if isinstance(node, FUNCTIONS) and getattr(tree, "bases", None):
            continue
        if any("setter" in ast.unparse(one) for one in node.decorator_list):
            continue
        yield from undocumented(node, node.name)


def test_public_names_have_docstrings():
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "pyvmm").rglob("*.py"))
        for name, line in undocumented(ast.parse(path.read_bytes(), str(path)))
    ]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_pages_name_files_that_are_there():
    """As they stand in the tree, or in the package or the tests."""
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    named = {
        (page.name, path)
        for page in pages
        if page.name not in UNBOUND
        for path in re.findall(r"`([\w./]+/[\w-]+\.(?:py|c|h|md))`", page.read_text())
    }
    assert len(named) > 10
    places = [ROOT, ROOT / "pyvmm", ROOT / "tests"]
    assert [one for one in sorted(named) if not any((at / one[1]).exists() for at in places)] == []


def test_missing_docstrings_are_found():
    source = "class A:\n    def f(self): ...\nclass B(A):\n    'b'\n    def f(self): ...\n"
    found = list(undocumented(ast.parse(source)))
    assert found == [("module", 1), ("A", 1), ("f", 2)]
