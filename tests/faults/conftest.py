"""A guest that counts, for faults to be tried on."""

import pytest
from faults.tools import TICKER
from harness.tmpfs import Tmpfs


@pytest.fixture
def ticker(vm):
    """Starts a VM whose guest prints contiguous numbers; options as :class:`harness.Vm`'s."""

    def start(*options, **arguments):
        machine = vm(*options, append=TICKER, **arguments)
        machine.expect(r"tick 2\r\n")
        return machine

    return start


@pytest.fixture
def tmpfs(tmp_path):
    """Makes a :class:`harness.tmpfs.Tmpfs` of a given size."""
    made = []

    def make(size):
        made.append(Tmpfs(tmp_path / f"tmpfs{len(made)}", size))
        return made[-1]

    yield make
    for one in made:
        one.close()
