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


def foreign(source, flags):
    """What the object of a freestanding C file takes from others: undefined symbols, and ``%fs``,
    which is the thread pointer."""
    compiler = ["gcc", "-fPIC", "-fvisibility=hidden", *flags.split()]
    target = source.with_suffix(".o")
    run(*compiler, *setting("FREESTANDING_FLAGS"), "-I", FOLDER, "-c", source, "-o", target)
    undefined = {line.split()[-1] for line in run("nm", "-u", target).splitlines()}
    return undefined | ({"%fs"} if "%fs:" in run("objdump", "-d", target) else set())


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", setting("FREESTANDING"))
def test_carrier_has_nothing_of_others(name, flags, tmp_path):
    source = tmp_path / f"{name}.c"
    source.write_text((FOLDER / source.name).read_text())
    assert foreign(source, flags) == set()


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
    assert foreign(source, "-O2") - {"_GLOBAL_OFFSET_TABLE_"} == found
