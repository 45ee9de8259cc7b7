"""Imports go down only, and the run path imports nothing slow."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pyvmm"

RANKS = {
    name: rank
    for rank, names in enumerate(
        (
            ("errors", "_util", "wayback"),
            ("_native", "vmstate"),
            ("core", "cpr"),
            ("kvm", "memory"),
            ("backends", "chardev"),
            ("devices", "x86", "boot"),
            ("machine", "rundir"),
            ("migration",),
            ("monitor",),
            ("api", "cli", "state", "verbs"),
            ("__main__", "testing"),
        )
    )
    for name in names
}
#: Part -> parts of its own rank that it may import.
SIDEWAYS = {
    "_util": {"errors"},
    "backends": {"chardev"},
    "boot": {"x86"},
    "cli": {"api", "state", "verbs"},
}
#: Part -> lower parts that it must not import all the same.
FORBIDDEN = {"devices": {"kvm"}}


def modules():
    """Every module of the package: dotted name -> path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path):
    """Dotted names of what a module imports from the package, wherever in it: (name, line)."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, node.module or ""] if node.level else [node.module])
            for alias in node.names:
                yield f"{source.rstrip('.')}.{alias.name}", node.lineno


def part(name):
    """The part of pyvmm that a dotted name lies in; pyvmm for the package itself."""
    return name.split(".")[:2][-1]


def complaint(importer, target):
    """What is wrong with one part's importing another, or ''."""
    if target not in RANKS or importer == target or (importer, target) == ("pyvmm", "wayback"):
        return ""  # pyvmm.__version__, or a part's own modules; the way back comes first of all
    mine, its = RANKS.get(importer, -1), RANKS[target]  # -1: pyvmm itself imports no part
    if target == "testing" or target in FORBIDDEN.get(importer, ()):
        return f"{importer} must not import {target}"
    if its < mine or (its == mine and target in SIDEWAYS.get(importer, ())):
        return ""
    return f"{importer} (rank {mine}) imports {target} (rank {its})"


def test_every_part_has_a_rank():
    assert {part(name) for name in modules()} - {"pyvmm"} <= set(RANKS)


def test_imports_go_down_only():
    wrong = []
    for name, path in modules().items():
        for target, line in imported(name, path):
            if target.split(".")[0] == "pyvmm" and (why := complaint(part(name), part(target))):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {why}")
    assert not wrong, "\n".join(wrong)


def test_rank_rule_finds_what_it_should():
    assert complaint("devices", "machine") == "devices (rank 5) imports machine (rank 6)"
    assert complaint("kvm", "memory") == "kvm (rank 3) imports memory (rank 3)"
    assert complaint("devices", "kvm") == "devices must not import kvm"
    assert complaint("api", "testing") == "api must not import testing"
    assert complaint("pyvmm", "errors") == "pyvmm (rank -1) imports errors (rank 0)"
    assert complaint("boot", "x86") == complaint("machine", "kvm") == ""


#: Modules of one part that import each other, in a circle, counting what is imported late or for
#: types alone. None may be added.
CIRCLES = {
    ("pyvmm.devices.virtio.device", "pyvmm.devices.virtio.mmio"),
    ("pyvmm.kvm.system", "pyvmm.kvm.vcpu", "pyvmm.kvm.vm"),
    ("pyvmm.monitor.hmp.commands", "pyvmm.monitor.hmp.interpreter"),
    ("pyvmm.monitor.hmp.console", "pyvmm.monitor.hmp.console_prompt"),
    ("pyvmm.x86.acpi", "pyvmm.x86.mptable", "pyvmm.x86.tables"),
}


def circles(arrows):
    """The sets of modules that reach each other; arrows: module -> those that it imports."""
    reached = {}
    for name in arrows:
        found, left = set(), [name]
        while left:
            new = arrows.get(left.pop(), set()) - found
            found |= new
            left += new
        reached[name] = found
    return {
        tuple(sorted(other for other in found if name in reached.get(other, ())))
        for name, found in reached.items()
        if name in found
    }


def test_no_circle_inside_a_part():
    known = modules()
    arrows = {}
    for name, path in known.items():
        targets = {t if t in known else t.rpartition(".")[0] for t, _ in imported(name, path)}
        arrows[name] = {t for t in targets & set(known) if t != name and part(t) == part(name)}
    assert circles(arrows) <= CIRCLES


def test_circles_are_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"e"}}
    assert circles(arrows) == {("a", "b", "c"), ("e",)}
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == set()


# What an interpreter imports between execve and the first KVM_RUN lengthens the pause of every
# live update; each of these costs 1 to 200 ms.
SLOW = {
    "argparse",
    "asyncio",
    "bz2",
    "collections",
    "construct",
    "contextlib",
    "ctypes",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "inspect",
    "json",
    "logging",
    "lz4",
    "lzma",
    "pathlib",
    "prompt_toolkit",
    "re",
    "selectors",
    "shlex",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "traceback",
    "typing",
    "zlib",
    "zstandard",
}
#: Not on the path of ``pyvmm run``: the build, the interactive console, the tests' helpers.
OFF_PATH = (
    "pyvmm.__main__",
    "pyvmm._native.build",
    "pyvmm.migration.preflight",  # runs while the guest does
    "pyvmm.monitor.hmp.console",
    "pyvmm.testing",
    "pyvmm.state",
    "pyvmm.verbs",
)

# Runs in a bare interpreter and names the line that imports a slow module first.
PROBE = """
import sys
slow, names, sys.path[:] = eval(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
already = slow & set(sys.modules)
found = []
class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in slow:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: imports {name}")
sys.meta_path.insert(0, Watch)
for name in names:
    __import__(name)
print(*(found or ["none"]), sep="\\n")
sys.exit(f"in sys.modules from the start: {already}" if already else 0)
"""


def slow_imports(names, path=sys.path):
    probe = [sys.executable, "-I", "-S", "-c", PROBE, repr(SLOW), repr(names), repr(path)]
    result = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_run_path_imports_nothing_slow():
    names = [name for name in modules() if not name.startswith(OFF_PATH)]
    assert slow_imports(names, [str(ROOT), *sys.path]) == ["none"]


def test_update_does_not_import_the_kernel_loaders():
    names = {"pyvmm.boot.loader", "pyvmm.boot.linux", "pyvmm.boot.elf"}
    code = f"import sys, pyvmm.machine.builder; sys.exit({names!r} & set(sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_slow_imports_are_found(tmp_path):
    (tmp_path / "sluggish.py").write_text("import os\n\nimport json\n")
    first, *others = slow_imports(["sluggish"], [str(tmp_path), *sys.path])
    assert first == f"{tmp_path}/sluggish.py:3: imports json"
    assert others  # what json imports in its turn
