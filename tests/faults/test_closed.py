"""A VM that was started without standard input, output or error."""

import os
import subprocess

import pytest
from faults.tools import check_alive, check_ticking
from harness import DEADLINE_S, process, pyvmm

SUBSETS = ["0", "1", "2", "01", "02", "12", "012"]


def without(numbers):
    """The first words of a ``pyvmm run`` for which these descriptors are closed."""
    closed = " ".join(f"{number}{'<' if number == '0' else '>'}&-" for number in numbers)
    return ("sh", "-c", f'exec "$0" "$@" {closed}', pyvmm(), "run")


@pytest.mark.parametrize("numbers", SUBSETS)
def test_is_updated_like_any_other(ticker, numbers):
    machine = ticker("-chardev", "stdio,id=c", "-mon", "c", program=without(numbers))
    for _ in range(2):
        check_alive(machine)
        found = process.descriptors(machine.pid)
        assert {found[int(number)] for number in numbers} == {os.devnull}
    check_ticking(machine)


@pytest.mark.parametrize("numbers", SUBSETS)
def test_output_of_a_start_that_fails_gets_into_no_file(tmp_path, numbers):
    words = [
        *without(numbers),
        "-chardev",
        f"file,id=c,path={tmp_path}/out",
        "-serial",
        "chardev:c",
    ]
    result = subprocess.run(
        [*words, "-serial", "pty", "-kernel", "nowhere"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=process.environment(),
    )
    assert result.returncode in (1, 2)
    assert ("nowhere" in result.stderr) == ("2" not in numbers)
    assert "nowhere" not in result.stdout
    assert (tmp_path / "out").read_bytes() == b""
