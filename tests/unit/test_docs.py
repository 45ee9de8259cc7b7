"""Modules and public names say what they are, and functions what they return."""

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


def silent_about_returns(tree):
    """Functions below ``tree`` whose docstring does not say what they return: (name, line).

    Private and inner functions are looked at, too. Properties may be noun phrases.
    """
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS) or node.returns is None:
            continue
        if ast.unparse(node.returns) in ("None", "NoReturn", "Never"):
            continue
        if any(ast.unparse(one).endswith("property") for one in node.decorator_list):
            continue
        text = ast.get_docstring(node)
        if text is not None and not re.search(r"\b[Rr]eturns?\b", text):
            yield node.name, node.lineno


def in_package(find):
    """What ``find`` finds in every module, as lines for a person."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "pyvmm").rglob("*.py"))
        for name, line in find(ast.parse(path.read_bytes(), str(path)))
    ]


def test_public_names_have_docstrings():
    missing = in_package(undocumented)
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_docstrings_say_what_is_returned():
    silent = in_package(silent_about_returns)
    assert not silent, 'no "Return ..." or ":returns:":\n' + "\n".join(silent)


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


def test_rules_of_the_kernel_are_shown():
    """Each test of theirs is named beside a rule in docs/carrier.md, and nothing else is."""
    cells = set()
    column = None
    for line in (ROOT / "docs" / "carrier.md").read_text().splitlines():
        row = [cell.strip() for cell in line.split("|")]
        if "shown by" in row:
            column = row.index("shown by")
        elif not line.startswith("|"):
            column = None
        elif column and set(row[column]) != {"-"}:
            cells |= set(row[column].split(", "))
    tests = {
        node.name.removeprefix("test_")
        for name in ("test_carrier_rules.py", "test_access_rules.py")
        for node in ast.parse((ROOT / "tests" / "kvm" / name).read_text()).body
        if isinstance(node, FUNCTIONS) and node.name.startswith("test_")
    }
    assert cells - {"the same"} == tests


def test_missing_docstrings_are_found():
    source = "class A:\n    def f(self): ...\nclass B(A):\n    'b'\n    def f(self): ...\n"
    found = list(undocumented(ast.parse(source)))
    assert found == [("module", 1), ("A", 1), ("f", 2)]


def test_silence_about_returns_is_found():
    source = (
        "class A:\n"
        "    def f(self) -> int:\n        'The size.'\n"
        "    @property\n    def g(self) -> int:\n        'The size.'\n"
        "async def h() -> str:\n    'Whether it returned.'\n"
        "def i() -> None:\n    'Do it.'\n"
        "def j() -> int:\n    'Return the size.'\n"
        "def k() -> int:\n    'Do it.\\n\\n:returns: the size'\n"
        "def m() -> int: ...\n"
    )
    assert list(silent_about_returns(ast.parse(source))) == [("h", 7), ("f", 2)]
