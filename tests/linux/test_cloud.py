"""Debian's cloud kernel, a bzImage, told nothing of the machine: finds all of it and drives it.

The guest's log of its boot comes out by way of the disk, where it costs little.
"""

import re
import time
from itertools import pairwise

import pytest
from harness import linux
from harness.network import GUEST_MAC, StreamPeer
from harness.stream import Peer, consoles

BOOT_S = 240
DISK_SIZE = 4 << 20

#: What is behind each of ACPI's devices, and drives it.
LOOK = r"""
bound() { [ -e $2/driver ] && echo bound: $1 $(basename $(readlink $2/driver)); }
for device in /sys/bus/acpi/devices/* /sys/bus/virtio/devices/*; do
    name=${device##*/}
    bound $name $device || bound $name $device/physical_node || echo bound: $name nothing
done
grep -E 'tty|rtc|acpi|virtio' /proc/interrupts | sed 's/  */ /g; s/^ */irq: /'
grep -E '^(physical id|core id|apicid)' /proc/cpuinfo | sed 's/[ \t]*:/ =/; s/^/cpu: /'
echo clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource) \
    $(cat /sys/class/rtc/rtc0/since_epoch)
"""
USE = r"""
cd /sys/firmware/qemu_fw_cfg
echo fw_cfg: $(cat rev) $(cat by_name/opt/text/raw) $(cat by_key/*/name | sort)
echo note: $(od -An -tx2 -N4 by_name/etc/vmcoreinfo/raw)
cd /
echo timers: $(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)
echo disk: $(cat /sys/block/vda/serial) $(cat /sys/block/vda/size)
echo net: $(cat /sys/class/net/eth0/address)
ip link set eth0 up
echo rng: $(cat /sys/class/misc/hw_random/rng_current) $(head -c 512 /dev/hwrng | md5sum)
echo port: $(cat /sys/class/virtio-ports/*p1/name)
# One descriptor for both ways: what comes while nobody has a port open is thrown away.
exec 3<>/dev/vport3p1
echo ping >&3
read -r line <&3
echo port: $line
exec 4<>/dev/hvc0
stty raw -echo <&4
echo hello >&4
read -r line <&4
echo console: $line
rtc=/sys/class/rtc/rtc0
echo $(($(cat $rtc/since_epoch) + 2)) >$rtc/wakealarm
while [ -n "$(cat $rtc/wakealarm)" ]; do sleep 0.2; done
echo alarm: $(grep rtc0 /proc/interrupts | awk '{ print $2 + $3 }')
while grep -q '^ *0 ' /sys/firmware/acpi/interrupts/ff_pwr_btn; do sleep 0.2; done
echo pressed
dmesg -r >/dev/vda
sync
echo c >/proc/sysrq-trigger
"""
DRIVERS = {
    "LNRO0005:00": "virtio-mmio",
    "LNRO0005:01": "virtio-mmio",
    "LNRO0005:02": "virtio-mmio",
    "LNRO0005:03": "virtio-mmio",
    "LNXPWRBN:00": "button",
    "PNP0501:00": "serial",
    "PNP0B00:00": "rtc_cmos",
    "QEMU0001:00": "pvpanic-mmio",
    "QEMU0002:00": "fw_cfg",
    "virtio0": "virtio_blk",
    "virtio1": "virtio_net",
    "virtio2": "virtio_rng",
    "virtio3": "virtio_console",
}
FW_CFG_FILES = [
    *("etc/acpi/rsdp", "etc/acpi/tables", "etc/e820", "etc/pvpanic-port", "etc/table-loader"),
    *("etc/vmcoreinfo", "opt/text"),
]
IRQS = [
    *[("4", "4-edge", "ttyS0"), ("8", "8-edge", "rtc0"), ("9", "9-fasteoi", "acpi")],
    *[(f"{16 + number}", f"{16 + number}-edge", f"virtio{number}") for number in range(4)],
]
#: The machine has no PCI, which nothing but the command line could tell before it is looked for.
NO_PCI = {"PCI: Fatal: No config space access function found", "PCI: System does not support PCI"}
#: Said once by a guest whose processor the host has taken for a while, as a busy one does with an
#: emulated machine.
SLOW_HOST = "hrtimer: interrupt took "
#: Where a kernel waits for hardware that does not answer.
PROBES = {
    "acpi_init",
    "pci_arch_init",
    "pci_subsys_init",
    "pnpacpi_init",
    "init_acpi_pm_clocksource",
    "serial8250_init",
    "i8042_init",
    "atkbd_init",
    "cmos_init",
}


@pytest.fixture
def peers(tmp_path):
    """The other ends of the console, the port and the network."""
    made = [Peer(tmp_path, "con0"), Peer(tmp_path, "port1"), StreamPeer(tmp_path)]
    yield made
    for peer in made:
        peer.close()


def lines(machine, name):
    """What the guest printed behind a word."""
    text = machine.serial.decode(errors="replace").replace("\r", "")
    return re.findall(rf"^{name}: (.*)$", text, re.M)


def boot_log(path):
    """The guest's messages, from the disk: level, time in seconds, text."""
    text = path.read_bytes().rstrip(b"\0").decode(errors="replace")
    found = re.findall(r"^<(\d+)>\[ *(\d+\.\d+)\] (.*)$", text, re.M)
    return [(int(level) & 7, float(seconds), text) for level, seconds, text in found]


def test_whole_machine_is_found_and_works(vm, tmp_path, peers):
    console, port, network = peers
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_SIZE))
    # The messages of initcall_debug stay in the log, which has to have room for them.
    options = linux.options(
        tmp_path,
        linux.COLDPLUG + LOOK + USE,
        "initcall_debug log_buf_len=2M",
        files=linux.module_tree(),
    )
    machine = vm(
        *options,
        *("-drive", f"file={disk},format=raw,if=none,id=d0"),
        *("-device", "virtio-blk-device,drive=d0,serial=disk-0"),
        *network.options,
        *("-device", "virtio-rng-device"),
        *consoles(console, port),
        *("-device", "pvpanic", "-action", "panic=exit-failure"),
        *("-device", "vmcoreinfo", "-fw_cfg", "opt/text,string=hello"),
        memory="256M",
        smp="2,sockets=2",
    )
    booted = time.time()
    machine.expect(r"rng: virtio_rng\.0 [0-9a-f]{32}", BOOT_S)
    assert port.receive(5, timeout=BOOT_S) == b"ping\n"
    port.send(b"pong\n")
    assert console.receive(6, timeout=BOOT_S) == b"hello\n"
    console.send(b"there\n")
    machine.expect(r"alarm: 1\r?\n", BOOT_S)
    machine.hmp("system_powerdown")
    machine.expect(r"pressed\r?\n", BOOT_S)
    assert machine.wait_exit(BOOT_S) == 1  # the panic

    assert dict(each.split() for each in lines(machine, "bound")) == DRIVERS | {
        "LNXSYBUS:00": "nothing",
        "LNXSYBUS:01": "nothing",
        "LNXSYSTM:00": "nothing",
    }
    irqs = [re.findall(r"\S+", line) for line in lines(machine, "irq")]
    assert [(words[0].rstrip(":"), *words[-2:]) for words in irqs] == IRQS
    places = [re.sub(r"\D+", "", line) for line in lines(machine, "cpu")]
    assert places == [*"000", *"101"]  # socket, core, APIC id
    source, now = lines(machine, "clock")[0].split()
    assert source == "kvm-clock"
    assert booted - 2 <= int(now) <= time.time() + 2
    assert lines(machine, "fw_cfg")[0].split() == ["3", "hello", *FW_CFG_FILES]
    # What the kernel has written as a whole: nothing for the host, ELF for the guest.
    assert lines(machine, "note") == ["0000 0001"]
    assert "acpi_pm" in lines(machine, "timers")[0].split()
    assert lines(machine, "disk") == [f"disk-0 {DISK_SIZE >> 9}"]
    assert lines(machine, "net") == ["52:54:00:12:34:56"]
    assert network.frames(1)[0][6:12] == GUEST_MAC
    assert lines(machine, "port") == ["org.test.port1", "pong"]
    assert lines(machine, "console") == ["there"]
    assert machine.stderr() == ""

    log = boot_log(disk)
    complaints = {text for level, _, text in log if level <= 4 and not text.startswith(SLOW_HOST)}
    assert complaints - NO_PCI == set()
    check_for_stalls(log)


def check_for_stalls(log):
    """Nothing in the boot waits for hardware. All times are the guest's own, so that only their
    proportions count on a slow host."""
    (up,) = (seconds for _, seconds, text in log if text.startswith("Run /init"))
    times = [0.0, *(seconds for _, seconds, _ in log if seconds <= up)]
    gap, before = max((after - before, before) for before, after in pairwise(times))
    assert gap < up / 2, f"{gap} of {up} s from {before} on"
    took = {
        name: int(us) / 1e6
        for _, _, text in log
        for name, us in re.findall(r"^initcall (\w+)\S* returned \S+ after (\d+) usecs", text)
    }
    assert took.keys() >= PROBES
    slow = {name: took[name] for name in PROBES if took[name] > up / 10}
    assert slow == {}, f"of {up} s"
