"""The fuzzer's targets with the inputs that are kept, without the fuzzer; and what it tells."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import corpus, one

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", one.names())
def test_kept_inputs(name):
    target, seeds = one.find(name)
    kept = corpus.read(name)
    assert len(kept) > 10
    for data in (*seeds, *kept.values()):
        target(data)


def test_an_input_is_tried_again(tmp_path):
    file = tmp_path / "crash-1"
    file.write_bytes(b"info status\n")
    done = run("--replay", str(file), "hmp")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nonsense"], "no target nonsense; there are state, handover"),
        (["--replay", "FILE"], "--replay FILE takes the target that the file is of"),
        (["--replay", "missing", "hmp"], "missing: No such file or directory"),
        (["--seconds", "0"], "--seconds 0: give one at least"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(arguments, problem):
    done = run(*arguments)
    assert done.returncode == 2
    assert problem in done.stderr.splitlines()[-1]


def test_summary_and_reason():
    assert one.summary("#9 pulse cov: 11 ft: 12 corp: 3/5b\nDone 187605 runs in 6 second(s)") == (
        "187605 inputs, coverage 11, 3 kept"
    )
    text = "#1 INITED\n === Uncaught Python exception: ===\nValueError: x\n"
    assert one.reason(text).splitlines()[-1] == "  ValueError: x"
    assert "ERROR: AddressSanitizer: SEGV" in one.reason("==1==ERROR: AddressSanitizer: SEGV\n#0")
    assert one.reason("killed") == "  killed"
