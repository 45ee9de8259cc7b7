"""A guest that counts, for faults to be tried on."""

import pytest
from faults.tools import TICKER


@pytest.fixture
def ticker(vm):
    """Starts a VM whose guest prints contiguous numbers; options as :class:`harness.Vm`'s."""

    def start(*options, **arguments):
        machine = vm(*options, append=TICKER, **arguments)
        machine.expect(r"tick 2\r\n")
        return machine

    return start
