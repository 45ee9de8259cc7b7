"""What a machine lives through in the tests of any life is what it is called."""

import pytest
from faults.tools import BACK
from harness import lives


@pytest.mark.parametrize("life", lives.LIVES, ids=lambda life: life.name)
def test_a_life_is_lived(vm, life):
    machine = vm(append="ticker period=20", life=life)
    machine.expect(r"tick 2\r\n")
    for _ in range(2):
        pid = machine.pid
        machine.live()
        migrated = machine.hmp("info migrate")
        assert (machine.pid != pid) == (life.name == "restored")
        is_over = life.name in ("updated", "plain", "restored")
        assert ("Status: \t\tcompleted" in migrated) == is_over
        way = {"updated": "running", "plain": "stopped"}.get(life.name)
        assert way is None or f"Guest in the exec: \t{way}\n" in migrated
        assert (BACK in migrated) == (life.name == "returned")
        assert ("-incoming" in machine.cmdline) == (life.name != "booted")
        machine.seen = len(machine.serial)
        machine.expect(r"tick \d+\r\n")
    ticks = machine.serial.decode().split("\r\n")[1:-1]
    assert ticks == [f"tick {number}" for number in range(1, len(ticks) + 1)]
