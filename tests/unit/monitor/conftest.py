"""A monitor on a fake machine: what is typed, and what comes out."""

import pytest

from pyvmm.monitor.commands import build_registry
from pyvmm.monitor.hmp.interpreter import Interpreter
from pyvmm.monitor.registry import Context
from pyvmm.testing.fake_machine import FakeMachine, FakeMigration


@pytest.fixture
def machine():
    machine = FakeMachine(cpus=2)
    yield machine
    machine.close()


@pytest.fixture
def context(machine):
    return Context(machine, FakeMigration(), build_registry())


@pytest.fixture
def run(context):
    """Run one line and return its output."""
    interpreter = Interpreter(context)

    def run(line):
        texts = []
        interpreter.execute(line, texts.append)
        assert len(texts) == 1, "the command did not finish at once"
        return texts[0]

    return run
