"""Live updates of a Linux guest that is at work."""

import re

from harness import linux

BOOT_S = 240
UPDATES = 3


def test_count_on_the_serial_port_goes_on(vm, tmp_path):
    script = 'i=0\nwhile :; do echo "count $i"; i=$((i + 1)); done\n'
    machine = vm(*linux.options(tmp_path, script), memory="256M")
    machine.expect(r"count 10\r?\n", BOOT_S)
    for _ in range(UPDATES):
        machine.update(BOOT_S)
        last = int(machine.expect(r"count (\d+)\r?\n", BOOT_S)[1])
        machine.expect(rf"count {last + 20}\r?\n", BOOT_S)
    text = machine.serial[machine.serial.index(b"count 0") : machine.seen]
    lines = [line for line in text.decode().replace("\r", "").split("\n") if line]
    printed = [line for line in lines if not re.match(r"\[ *\d+\.\d+\] ", line)]
    assert printed == [f"count {number}" for number in range(len(printed))]
