"""A guest's memory becomes huge pages beside the guest, which notices nothing, and stays so over an
update."""

import os
import re

import pytest
from harness import needs
from harness.process import memfd, wait_until

MIB = 1 << 20
RAM = 32 * MIB  # on a busy host the work takes its time
#: The first 2 MiB of a guest's memory have a hole, and the built-in guest does not use all of it.
MOST, LEAST = RAM, RAM - 8 * MIB


@pytest.fixture(autouse=True)
def _huge_pages():
    needs.collapse()


def told(machine):
    """What ``info memdev`` says of the guest's RAM: the line, and bytes in huge pages."""
    (line,) = re.findall(r"  collapse: (.*)", machine.hmp("info memdev").partition("pc.bios")[0])
    found = re.search(r"(\d+) MiB in huge pages", line)
    return line, int(found[1]) * MIB if found else 0


def mapped(machine):
    """Bytes that the process has mapped as huge pages."""
    with open(f"/proc/{machine.pid}/smaps") as smaps:
        found = re.findall(r"^(?:Shmem|File)PmdMapped: +(\d+) kB", smaps.read(), re.M)
    return sum(map(int, found)) * 1024


def await_huge(machine):
    wait_until(lambda: LEAST <= told(machine)[1] <= MOST, "guest RAM is huge pages")
    wait_until(lambda: "upkeep" not in machine.threads(), "the look ends")


def test_touched_memory_becomes_huge_and_stays_so(vm):
    machine = vm(append="counter touch=all walk", memory="32M")
    machine.expect("counter ready")
    await_huge(machine)
    wait_until(lambda: LEAST <= mapped(machine) <= MOST, "the guest has touched all of it")
    _, huge = told(machine)
    machine.update()
    # The new image was told, and maps it so as soon as the guest touches it.
    assert told(machine)[1] >= huge
    wait_until(lambda: mapped(machine) >= LEAST, "the new image has it mapped")
    wait_until(lambda: "mapped again" in machine.hmp("info migrate"), "the end of the faults")
    pages, huge = re.search(
        r"(\d+) pages mapped again, (\d+) of them huge", machine.hmp("info migrate")
    ).groups()
    # The processor may have no use for huge pages, and then there are far more.
    assert int(huge) >= LEAST // (2 * MIB) or int(pages) > int(huge)
    assert machine.stderr() == ""


@pytest.mark.parametrize("smp", [1, 2])
def test_guest_finds_what_it_wrote(vm, smp):
    machine = vm(append="memhash", smp=smp, memory="32M")
    machine.expect(r"memhash pass \d+ ok")
    await_huge(machine)
    for _ in range(3):
        machine.update()
        machine.expect(r"memhash pass \d+ ok")
    assert told(machine)[1] >= LEAST
    assert b"FAIL" not in machine.serial
    assert machine.stderr() == ""


def test_memory_that_is_not_touched_stays_the_hosts(vm):
    machine = vm(append="counter touch=20", memory="32M")
    machine.expect("counter ready")
    wait_until(lambda: told(machine)[1] >= 16 * MIB, "what was touched is huge pages")
    wait_until(lambda: "upkeep" not in machine.threads(), "the look ends")
    for _ in range(2):
        with open(memfd(machine.pid, "pc.ram"), "rb") as file:
            assert os.fstat(file.fileno()).st_blocks * 512 < 28 * MIB
        machine.update()


def test_file_in_memory(vm, tmp_path):
    path = f"/dev/shm/pyvmm-test-{os.getpid()}"
    try:
        backend = f"memory-backend-file,id=ram0,size={RAM},mem-path={path},share=on"
        machine = vm("-object", backend, append="memhash", memory=None)
        await_huge(machine)
        machine.update()
        machine.expect(r"memhash pass \d+ ok")
        assert told(machine)[1] >= LEAST
        assert mapped(machine)
    finally:
        os.unlink(path)


def test_off(vm):
    machine = vm("-machine", "ram-collapse=off", append="counter touch=all", memory="32M")
    machine.expect("counter ready")
    machine.update()
    assert told(machine) == ("off", 0)
    assert not mapped(machine)
    machine.argv = [word.replace("ram-collapse=off", "ram-collapse=on") for word in machine.argv]
    machine.update()
    await_huge(machine)


def test_goes_on_after_an_update_that_is_refused(vm):
    machine = vm(append="counter touch=all", memory="32M")
    machine.expect("counter ready")
    uri = "file:vm.state"
    machine.set_update([*machine.argv, "-smp", "2", "-incoming", uri])
    assert "-smp" in machine.hmp(f"migrate {uri}")
    await_huge(machine)
