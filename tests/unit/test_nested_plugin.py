"""The plugin that runs Linux tests in nested machines, on machines that are processes here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

CONFTEST = """
import os, subprocess
import pytest
from nested import machine, packages, plugin, port

pytest_plugins = ["nested.plugin"]


class Machine:
    def __init__(self, folder):
        assert os.path.isdir(folder)
        self.process = None

    def __enter__(self):
        if os.path.exists("no-machine"):
            raise port.NestedError("does not answer")
        return self

    def __exit__(self, *_):
        pass

    def kill(self):
        if self.process:
            self.process.kill()

    def run(self, command, timeout, *, env, on_output):
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = b""
        while data := os.read(self.process.stdout.fileno(), 4096):
            output += data
            on_output(data)
        code = self.process.wait()
        if code < 0:
            raise port.NestedError("ended")
        return machine.Result(code, output.decode())


def fetch():
    if os.path.exists("no-packages"):
        raise packages.MissingError("no packages")


def pytest_configure(config):
    config.addinivalue_line("markers", "linux: x")
    plugin.NestedMachine = Machine
    plugin.packages.qemu = fetch
    plugin.packages.fetch = lambda: None
    plugin.SILENCE_S = float(os.environ.get("SILENCE_S", plugin.SILENCE_S))
"""

MODULE = """
import os, signal
import pytest

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def once(name):
    if os.path.exists(name):
        return False
    open(name, "w").close()
    return True

def test_here():
    assert "PYVMM_NESTED" not in os.environ

@pytest.mark.linux
class TestLinux:
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest on methods of a class of Linux tests; its exit status and what it prints."""

    def run(methods, *options, **environment):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_it.py").write_text(MODULE + methods)
        environment = {"PYTHONPATH": str(TESTS), "PYVMM_REQUIRE_KVM": "1"} | environment
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options]
        done = subprocess.run(
            [*command, "--linux-kvm=nested", "."],
            cwd=tmp_path,
            env={key: os.environ[key] for key in os.environ.keys() - {"PYVMM_NESTED", "CI"}}
            | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        outcomes = re.findall(r"^(PASSED|FAILED|SKIPPED) \S*?(\w+)(?: |$)", done.stdout, re.M)
        return done.returncode, {name: word.lower() for word, name in outcomes}, done.stdout

    return run


def test_reports_come_over(run):
    status, outcomes, output = run("""
    def test_passes(self):
        assert os.environ["PYVMM_NESTED"] == "inside"
    def test_fails(self):
        print("what it printed")
        assert 1 == 2
    def test_passes_too(self):
        pass
""")
    assert status == 1
    assert outcomes == {
        "test_here": "passed",
        "test_passes": "passed",
        "test_fails": "failed",
        "test_passes_too": "passed",
    }
    assert "assert 1 == 2" in output
    assert "what it printed" in output
    assert "1 failed, 3 passed" in output


def test_machine_that_ends_has_one_more_chance(run):
    status, outcomes, output = run("""
    def test_before(self):
        assert once("before"), "it was done already"
    def test_ends_it_once(self):
        if once("ends_it_once"):
            end()
    def test_ends_it(self):
        end()
    def test_after(self):
        assert once("after"), "it was done already"
""")
    assert status == 1
    wanted = dict.fromkeys(
        ["test_here", "test_before", "test_ends_it_once", "test_after"], "passed"
    )
    assert outcomes == wanted | {"test_ends_it": "failed"}
    assert output.count("once more, ended") == 2


def test_machine_that_says_nothing_any_more_is_ended(run):
    # It has to come up within that time, too.
    status, outcomes, output = run(
        """
    def test_before(self):
        assert once("before"), "it was done already"
    def test_hangs_once(self):
        if once("hangs_once"):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            signal.pause()
""",
        SILENCE_S="10",
    )
    assert status == 0
    assert outcomes == dict.fromkeys(["test_here", "test_before", "test_hangs_once"], "passed")
    assert output.count("once more, ended") == 1


def test_machine_that_does_not_come_up(run, tmp_path):
    (tmp_path / "no-machine").touch()
    status, outcomes, _ = run("""
    def test_a(self): pass
    def test_b(self): pass
    def test_c(self): pass
""")
    assert status == 1
    assert outcomes == {"test_here": "passed"} | dict.fromkeys(
        ["test_a", "test_b", "test_c"], "failed"
    )


@pytest.mark.parametrize(("required", "status"), [("1", 1), ("", 0)])
def test_what_is_missing_fails_only_where_it_is_required(run, tmp_path, required, status):
    (tmp_path / "no-packages").touch()
    found, outcomes, output = run("    def test_a(self): pass\n", PYVMM_REQUIRE_KVM=required)
    assert found == status
    assert outcomes["test_here"] == "passed"
    assert "nested machine: no packages" in output


def test_first_failure_ends_the_machines(run):
    status, outcomes, _ = run(
        """
    def test_a(self):
        assert 1 == 2
    def test_b(self):
        signal.pause()
""",
        "-x",
    )
    assert status == 1
    assert outcomes == {"test_here": "passed", "test_a": "failed"}


def test_pytest_that_does_not_run_them(run):
    status, outcomes, output = run("    def test_a(self):\n        os._exit(3)\n")
    assert status == 1
    assert outcomes == {"test_here": "passed", "test_a": "failed"}
    assert "pytest ended with status 3" in output
