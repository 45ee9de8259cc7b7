"""The guest's time goes on while it is stopped, and it does not take that for a lockup."""

import time

from harness import linux, wait_until

BOOT_S = 240
THRESHOLD_S = 3
#: Linux complains of a CPU that did nothing else for twice the threshold.
STOPPED_S = 2 * THRESHOLD_S + 3

SCRIPT = f"""
echo {THRESHOLD_S} >/proc/sys/kernel/watchdog_thresh
# A CPU that idles is not suspected.
for cpu in 0 1; do
    while :; do :; done &
done
echo watched: $(cat /proc/sys/kernel/soft_watchdog /proc/sys/kernel/watchdog_thresh)
while read -r line; do
    sleep {THRESHOLD_S}
    echo complaints: $(dmesg | grep -cE 'lockup|stall')
    echo seconds: $(cut -d. -f1 /proc/uptime)
done
"""


def test_long_stop_is_no_lockup(vm, tmp_path):
    machine = vm(*linux.options(tmp_path, SCRIPT), memory="256M", smp=2)
    machine.expect(f"watched: 1 {THRESHOLD_S}", BOOT_S)
    machine.type("\n")
    machine.expect(r"complaints: 0\r?\n", BOOT_S)
    before = int(machine.expect(r"seconds: (\d+)\r?\n", BOOT_S)[1])
    machine.hmp("stop")
    end = time.monotonic() + STOPPED_S
    machine.update(BOOT_S)
    assert machine.status == "paused"
    wait_until(lambda: time.monotonic() > end, "the end of the stop", BOOT_S)
    machine.hmp("cont")
    machine.type("\n")
    assert machine.expect(r"complaints: (\d+)\r?\n", BOOT_S)[1] == b"0"
    assert int(machine.expect(r"seconds: (\d+)\r?\n", BOOT_S)[1]) >= before + STOPPED_S
