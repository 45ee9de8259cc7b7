"""What native code answers, under sanitizers: no access of a guest reaches beyond its own."""

import subprocess
from pathlib import Path

import harness
import pytest

import pyvmm._native

NATIVE = Path(pyvmm._native.__file__).parent
PROGRAM = Path(harness.__file__).parent / "answers.c"
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, built with sanitizers."""
    path = tmp_path_factory.mktemp("sanitized") / "answers"
    sources = [str(PROGRAM), str(NATIVE / "answers.c")]
    command = ["gcc", "-g", "-O1", *FLAGS, f"-I{NATIVE}", *sources, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return path


@pytest.mark.parametrize("seed", range(4))
def test_any_accesses(program, seed):
    done = subprocess.run([program, str(seed), "200000"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert int(done.stdout) > 1000
