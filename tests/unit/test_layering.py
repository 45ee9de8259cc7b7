"""Imports go down only, and the run path imports nothing slow."""

import re
import subprocess
import sys

import pytest
from harness.sources import ROOT, imported, modules

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
            ("cli", "state", "verbs"),
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
    "cli": {"state", "verbs"},
}
#: Part -> lower parts that it must not import all the same.
FORBIDDEN = {"devices": {"kvm"}}


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


def test_page_has_the_table_that_is_enforced():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([a-z0-9_, ]+?) \|", page, re.MULTILINE)
    assert {name: int(rank) for rank, names in rows for name in names.split(", ")} == RANKS


def test_imports_go_down_only():
    wrong = []
    for name, path in modules().items():
        for target, line in imported(name, path):
            if target.split(".")[0] == "pyvmm" and (why := complaint(part(name), part(target))):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {why}")
    assert not wrong, "\n".join(wrong)


#: Module -> modules of its own package that it must not import, wherever in it.
APART = {
    "pyvmm.migration.outgoing": {"pyvmm.migration.incoming"},
    "pyvmm.migration.incoming": {"pyvmm.migration.outgoing"},
    "pyvmm.migration.status": {"pyvmm.migration.outgoing", "pyvmm.migration.incoming"},
    "pyvmm.migration.channel": {"pyvmm.migration.outgoing", "pyvmm.migration.incoming"},
}


def reached(start):
    """What a module leads to inside its package: itself, what it imports, what that imports."""
    paths = modules()
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for target, _ in imported(name, paths[name]):
                target = target if target in paths else target.rpartition(".")[0]
                if f"{target}.".startswith(f"{start.rpartition('.')[0]}."):
                    waiting.append(target)
    return found


@pytest.mark.parametrize("name", APART)
def test_what_varies_stands_apart(name):
    assert not reached(name) & APART[name]


def test_reach_of_a_module_is_found():
    assert "pyvmm.migration.incoming" in reached("pyvmm.migration.manager")
    assert "pyvmm.migration.uri" in reached("pyvmm.migration.incoming")  # over open_channel


def test_rank_rule_finds_what_it_should():
    assert complaint("devices", "machine") == "devices (rank 5) imports machine (rank 6)"
    assert complaint("kvm", "memory") == "kvm (rank 3) imports memory (rank 3)"
    assert complaint("devices", "kvm") == "devices must not import kvm"
    assert complaint("cli", "testing") == "cli must not import testing"
    assert complaint("pyvmm", "errors") == "pyvmm (rank -1) imports errors (rank 0)"
    assert complaint("boot", "x86") == complaint("machine", "kvm") == ""


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
    "pyvmm.migration.outgoing",  # this and the next are imported when the guest runs
    "pyvmm.migration.preflight",
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


@pytest.mark.parametrize(
    ("importer", "names"),
    [
        (
            "pyvmm.machine.builder",
            ("boot.loader", "boot.linux", "boot.elf", "memory.upkeep"),
        ),
        # The old image's side of an update is imported when the new image's guest runs.
        (
            "pyvmm.migration.manager",
            ("migration.outgoing", "migration.rollback", "migration.holder", "migration.params"),
        ),
        # A fresh start has no state to read, and not every kernel is Linux.
        ("pyvmm.migration.manager", ("migration.savevm", "migration.channel", "vmstate.stream")),
        ("pyvmm.boot.loader", ("boot.linux", "boot.bzimage", "boot.unpack", "boot.bootparams")),
    ],
)
def test_start_does_not_import_what_it_has_use_for_later(importer, names):
    names = {f"pyvmm.{name}" for name in names}
    code = f"import sys, {importer}; sys.exit({names!r} & set(sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_slow_imports_are_found(tmp_path):
    (tmp_path / "sluggish.py").write_text("import os\n\nimport json\n")
    first, *others = slow_imports(["sluggish"], [str(tmp_path), *sys.path])
    assert first == f"{tmp_path}/sluggish.py:3: imports json"
    assert others  # what json imports in its turn
