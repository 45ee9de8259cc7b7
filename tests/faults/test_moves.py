"""The vCPUs' move to the carrier, disturbed."""

import pytest
from faults.tools import QMP, Qmp, check_ticking, faulty, update

#: A vCPU that was kicked just before does not get on until the update wants it.
KICKED = (
    "pyvmm.migration.running_exec:RunningExec.stop_guest",
    "import pyvmm.machine.cpu as c, time; c.waits = True; "
    "[cpu._kick() for cpu in arguments[0]._machine.cpus]; time.sleep(0.1)",
    "pyvmm.machine.cpu:Cpu._serve",
    "import pyvmm.machine.cpu as c, time\n"
    "while getattr(c, 'waits', False) and not arguments[0].vcpu.gate.slot: time.sleep(0.001)",
)


@pytest.mark.parametrize("smp", [1, 2])
def test_kick_of_something_else_at_the_same_time(ticker, smp):
    machine = ticker(*QMP, program=faulty(*KICKED), smp=smp)
    check_ticking(machine)
    with Qmp(machine.folder / "qmp.sock") as qmp:
        assert update(machine) == ""
        info = qmp.execute("query-migrate")
        assert (info["status"], info["running"], info.get("fallback")) == ("completed", True, None)
    check_ticking(machine)
