"""Updates from one version to another and back: the guest and all that talk to it go on."""

import pytest
from faults.tools import BACK, Qmp, check_ticking, options, ticks, update
from harness import guests, versions
from harness.qmp import Qmp as Events
from upgrade.machines import WORKS, Memory, Peers, Ticker, complaints, upgrade

import pyvmm

#: A fault that each version has a place for, behind the exec.
FAULT = ("pyvmm.devices.rtc:Rtc.load", "raise ValueError('injected')")


@pytest.mark.parametrize("kind", WORKS)
def test_there_and_back_twice(vm, tmp_path, order, kind):
    first, other = order
    work = kind()
    with Peers(tmp_path) as peers:
        machine = vm(*peers.options, append=work.append, smp=work.smp, program=first.run)
        work.begin(machine, peers)
        footprints = []
        with Qmp(machine.folder / "qmp.sock") as qmp:
            for _ in range(2):
                for version in (other, first):
                    work.before()
                    upgrade(machine, version)
                    work.check()
                    assert qmp.execute("query-status")["status"] == "running"
                footprints.append(machine.footprint())
        assert footprints[0] == footprints[1]
        assert complaints(machine) == []


def test_guest_stands_and_the_present_says_why(vm, order):
    """No predecessor knows a carrier."""
    present = versions.present().pyvmm
    qmp_option = ("-qmp", "unix:q.sock,server=on,wait=off")
    machine = vm(*qmp_option, append=Ticker.append, smp=2, program=order[0].run)
    machine.expect(r"tick 2\r\n")
    reason = f"the new version {pyvmm.__version__} cannot take over from this carrier"
    with Events(machine.folder / "q.sock") as qmp:
        capability = {"capability": "events", "state": True}
        qmp.execute("migrate-set-capabilities", capabilities=[capability])
        for version in (*order[::-1], order[1]):
            why = {"running": False, "fallback": reason} if present in machine.cmdline else {}
            qmp.execute("query-status")  # the events of what came before are there then
            qmp.events.clear()
            upgrade(machine, version)
            qmp.execute("query-status")
            told = [event["data"] for event in qmp.events if event["event"] == "MIGRATION"]
            # The old image's word is the first of the two.
            done = next(data for data in told if data["status"] == "completed")
            assert done == {"status": "completed", **why}
            check_ticking(machine)
            if version.pyvmm == present:
                assert "Guest in the exec: \tstopped\n" in machine.hmp("info migrate")
                assert update(machine) == ""
                assert "Guest in the exec: \trunning\n" in machine.hmp("info migrate")
                check_ticking(machine)


@pytest.mark.parametrize("backend", ["memfd,", "file,mem-path=ram,share=on,"])
def test_memory_objects_go_over(vm, order, backend):
    first, other = order
    work = Memory()
    ram = f"memory-backend-{backend}id=ram0,size=64M"
    machine = vm("-object", ram, memory=None, append=work.append, smp=2, program=first.run)
    work.begin(machine, None)
    for version in (other, first):
        upgrade(machine, version)
        work.check()
    assert complaints(machine) == []


def test_failed_update_goes_back(vm, tmp_path, order):
    """From either version to an image of the other that cannot load the state."""
    work = Ticker()
    with Peers(tmp_path) as peers:
        machine = vm(*peers.options, append=work.append, smp=2, program=order[0].run)
        work.begin(machine, peers)
        for own, other in (order, order[::-1]):
            reply = update(machine, [*other.faulty(*FAULT), *options(machine)])
            assert BACK in reply, reply
            assert own.pyvmm in machine.cmdline
            check_ticking(machine)
            upgrade(machine, other)
            check_ticking(machine)
        # Whoever writes no record of the way back is told there.
        told = [f"the new image did not take over: {line}" for line in ("ValueError: injected",)]
        assert complaints(machine) == told


@pytest.mark.parametrize("smp", [1, 2])
def test_state_file_of_a_predecessor_loads(vm, tmp_path, predecessor, smp):
    """RAM is in a file, so the process that loads the state need not be the one that wrote it."""
    first, other = predecessor, versions.present()
    ram = f"memory-backend-file,id=ram0,size=64M,mem-path={tmp_path}/ram,share=on"
    common = {"memory": None, "append": Ticker.append, "smp": smp}
    state = f"file:{tmp_path}/state"
    with Peers(tmp_path) as peers:
        machine = vm("-object", ram, *peers.options, **common, program=first.run)
        machine.expect(r"tick 2\r\n")
        # The new image does not run the guest, so RAM and state stay as they belong together.
        machine.set_update([*machine.argv, "-S", "-incoming", state])
        assert machine.hmp(f"migrate {state}") == ""
        machine.wait_status("paused")
        machine.hmp_quit()
        words = ("-object", ram, *peers.options, "-incoming", state)
        later = vm(*words, **common, program=other.run)
        assert later.status == "running"
        later.expect(r"tick \d+\r\n")
        # The update may have come in the middle of a line.
        later.serial[:0] = machine.serial
        later.seen = len(later.serial)
        later.expect(r"tick \d+\r\n")
        shown = ticks(later)
        assert shown == list(range(1, len(shown) + 1))
        assert complaints(later) == []


def select(key):
    """16-bit code: select an item of fw_cfg."""
    # mov $0x510, %dx; mov $key, %ax; out %ax, (%dx)
    return b"\xba\x10\x05\xb8" + key.to_bytes(2, "little") + b"\xef"


@pytest.mark.parametrize("key", [0, 5])
def test_guest_that_is_at_fw_cfg_stays_where_that_is(vm, tmp_path, predecessor, key):
    """No predecessor has it, and each takes a guest that has no use for it."""
    present = versions.present()
    code = select(5) + select(key) + guests.print_text("done") + guests.HALT
    machine = vm("-kernel", guests.flat(tmp_path, code), program=present.run)
    machine.expect("done")
    reply = update(machine, [*predecessor.run, *options(machine)])
    if key:
        assert "the guest uses fw_cfg[0], which the new version" in reply
        assert present.pyvmm in machine.cmdline
    else:
        assert reply == ""
        assert predecessor.pyvmm in machine.cmdline
    upgrade(machine, present)
