"""A vCPU that more than one task runs, by the program that measures it: a guest that did not go
on would end it with an error, or never."""

import subprocess

import pytest
from bench import move


@pytest.fixture(scope="module")
def program():
    with move.built() as path:
        yield path


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in move.EVERYTHING}))
def test_vcpus_go_on_in_another_task(program, kind):
    done = subprocess.run([program, kind, "2", "3"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    samples = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [len(times) for times in samples] == [2, 2, 2]
    assert min(min(times) for times in samples) > 0
