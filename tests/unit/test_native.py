"""The compiled module: its stub says what it has, and the carrier does without libc."""

import ast
import subprocess
from pathlib import Path

import pytest

import pyvmm._native
from pyvmm._native import ffi, lib

FOLDER = Path(pyvmm._native.__file__).parent


def face(name):
    """What a stub has to say of a name of the module: a type, or those of arguments and result."""
    value = getattr(lib, name)
    if isinstance(value, int):
        return "int"
    function = ffi.typeof(value)
    return [python_type(each) for each in (*function.args, function.result)]


def python_type(c_type):
    if c_type.cname == "char *":
        return "bytes"
    return {"primitive": "int", "pointer": "_Pointer", "void": "None"}[c_type.kind]


def told(stub):
    """The same of all the names in a stub."""
    faces = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.AnnAssign) and node.target.id != "_Pointer":
            faces[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            types = [*(argument.annotation for argument in node.args.args), node.returns]
            faces[node.name] = [ast.unparse(each) for each in types]
    return faces


def test_stub_says_what_the_module_has():
    assert told((FOLDER / "lib.pyi").read_text()) == {name: face(name) for name in dir(lib)}


def setting(name):
    """The value of a constant in build.py, which imports what only a build has."""
    for node in ast.parse((FOLDER / "build.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


# The last two as distributions build Python, and with it the extension.
FLAGS = ("-O0", "-O2", "-O3", "-O2 -fstack-protector-strong", "-O2 -fstack-protector-all")


def compiled(source, flags):
    """The object of a freestanding C file."""
    compiler = ["gcc", "-fPIC", *flags.split()]
    target = source.with_suffix(".o")
    run(*compiler, *setting("FREESTANDING_FLAGS"), "-I", FOLDER, "-c", source, "-o", target)
    return target


def symbols(target, which):
    """Names of an object's symbols: ``-u`` undefined, ``--defined-only``."""
    return {line.split()[-1] for line in run("nm", which, target).splitlines()}


def foreign(*targets):
    """What objects take from others: undefined symbols, and ``%fs``, the thread pointer."""
    undefined = set().union(*(symbols(target, "-u") for target in targets))
    defined = set().union(*(symbols(target, "--defined-only") for target in targets))
    is_threaded = any("%fs:" in run("objdump", "-d", target) for target in targets)
    return undefined - defined | ({"%fs"} if is_threaded else set())


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("flags", FLAGS)
def test_freestanding_files_have_nothing_of_others(flags, tmp_path):
    targets = []
    for name in setting("FREESTANDING"):
        source = tmp_path / f"{name}.c"
        source.write_text((FOLDER / source.name).read_text())
        targets.append(compiled(source, flags))
    assert foreign(*targets) == set()


def test_they_call_each_other_without_the_dynamic_linker():
    # Whoever binds a name late has libc's locks, and writes where others read.
    late = run("objdump", "-d", "--no-show-raw-insn", pyvmm._native._kvm.__file__)
    own = {name for name in dir(lib) if name.startswith("pyvmm_")}
    assert not [name for name in own if f"<{name}@plt>" in late]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("#include <errno.h>\nint f(void) { return errno; }", {"__errno_location"}),
        ("#include <unistd.h>\nint f(void) { return getpid(); }", {"getpid"}),
        ("void f(char *a, char *b, long n) { __builtin_memcpy(a, b, n); }", {"memcpy"}),
        ("extern int other; int f(void) { return other; }", {"other"}),
        ("static __thread int x; int f(void) { return x++; }", {"__tls_get_addr"}),
        (
            '#define LOCAL __thread __attribute__((tls_model("initial-exec")))\n'
            "static LOCAL int x; int f(void) { return x++; }",
            {"%fs"},
        ),
    ],
)
def test_what_is_of_others_is_found(code, found, tmp_path):
    source = tmp_path / "other.c"
    source.write_text(code)
    assert foreign(compiled(source, "-O2")) - {"_GLOBAL_OFFSET_TABLE_"} == found
