"""A Debian guest at work on its disk, its network and both its consoles while updates come."""

import hashlib
import os
import re
import socket
import threading

import pytest
from harness import fio, linux
from harness.network import GUEST_IP, PEER_IP, TAP, make_tap, namespace
from harness.process import wait_until
from harness.stream import Peer, consoles

BOOT_S = 240
UPDATES = 50
#: After so many it is made sure that all goes on without a further one.
ROUND = 5
STALL_S = 60
#: What the kernel has to say when its processor was not there for a while.
SLOW = r"hrtimer: interrupt took|clocksource: Long readout interval"
MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_console")
DISK_SIZE = 2 << 20
#: What the host sends at once, and how often. As all the work here: enough to be under way when an
#: update comes, and little enough to leave the emulated processors to it.
CHUNK = os.urandom(1 << 14)
PAUSE_S = 0.3

#: fio writes the whole disk at random places, eight requests at a time, reads it back and compares,
#: again and again until there is a file /end. Each time it has other data: a block of the time
#: before is an error, too.
SCRIPT = f"""
ip addr add {GUEST_IP}/24 dev eth0
ip link set eth0 up
mkfifo /copy /never
exec 9<>/never
sleep 1
dmesg -c >/dev/null

fio --name=verify --filename=/dev/vda --rw=randwrite --bs=16k --verify=crc32c --loops=1000000 \\
    --ioengine=io_uring --iodepth=8 --iodepth_batch=8 --thinktime=300ms --thinktime_blocks=8 \\
    --direct=1 --thread --disk_util=0 \\
    --trigger-file=/end --trigger=true --output=/fio >/dev/null 2>&1 &
fio=$!
md5sum </copy >/sum &
(nc {PEER_IP} 7007 -e tee /copy; touch /hung-up) &
number=0
while :; do
    echo "line $number"
    number=$((number + 1))
    read -t 0.5 -u 9
done >/dev/hvc0 &

# Once the host has hung up, fio gets the time to read back what was written before.
number=0 done=0 goal=0
while [ ! -e /hung-up ] || [ $done -lt $goal ]; do
    [ -e /hung-up ] || goal=$((done + 2 * {DISK_SIZE >> 9}))
    read -r _ _ read _ _ _ written _ </sys/block/vda/stat
    done=$((read + written))
    echo "count $number disk $done"
    number=$((number + 1))
    read -t 0.5 -u 9
done
echo end
touch /end
wait $fio
echo "fio ended with $?"
grep -E 'verify|err=|error' /fio
echo "received $(cat /sum)"
dmesg | sed 's/^/kernel: /'
poweroff -f
"""


class Echo:
    """The host's end of a connection over which the guest sends back what it gets.

    :ivar count: how much came back
    """

    def __init__(self, stream):
        self.count = 0
        self._stream = stream
        self._stream.settimeout(BOOT_S)
        self._ended = threading.Event()
        self._sent, self._returned = hashlib.md5(), hashlib.md5()
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def end(self):
        """End it in order; digests of what was sent and of what came back."""
        self._ended.set()
        for thread in self._threads:
            thread.join(BOOT_S)
        self._stream.close()
        return self._sent.hexdigest(), self._returned.hexdigest()

    def _send(self):
        number = 0
        while not self._ended.wait(PAUSE_S):
            # No part of it is like another.
            chunk = number.to_bytes(8, "little") + CHUNK
            self._stream.sendall(chunk)
            self._sent.update(chunk)
            number += 1
        self._stream.shutdown(socket.SHUT_WR)

    def _receive(self):
        while got := self._stream.recv(1 << 16):
            self._returned.update(got)
            self.count += len(got)


@pytest.fixture
def console(tmp_path):
    with Peer(tmp_path, "con0") as peer:
        yield peer


@pytest.mark.parametrize(("smp", "cache"), [(1, "writeback"), (2, "writethrough")])
def test_nothing_is_lost(vm, tmp_path, console, smp, cache):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_SIZE))
    options = linux.options(tmp_path, SCRIPT, modules=MODULES, files=fio.files())
    options += ["-drive", f"file={disk},format=raw,if=none,id=disk,cache={cache}"]
    options += ["-device", "virtio-blk-device,drive=disk"]
    options += [*TAP, *consoles(console)]
    with namespace(), socket.create_server(("0.0.0.0", 7007)) as listener:
        make_tap()
        machine = vm(*options, memory="256M", smp=smp)
        started = machine.expect(r"count 0 disk \d+\r\n", BOOT_S).end()
        listener.settimeout(BOOT_S)
        echo = Echo(listener.accept()[0])
        try:
            for _ in range(UPDATES // ROUND):
                for _ in range(ROUND):
                    # With one vCPU it runs through the exec, with two it stands: either way.
                    (machine.plain() if smp > 1 else machine).update(BOOT_S)
                wait_for_progress(machine, console, echo)
        finally:
            sent, returned = echo.end()
        assert machine.wait_exit(BOOT_S) == 0
    assert returned == sent
    lines, report = machine.serial[started:].decode().replace("\r", "").split("end\n")
    numbers = re.findall(r"count (\d+) disk \d+\n", lines)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    # Nothing else, such as the kernel's complaints.
    assert re.sub(r"count \d+ disk \d+\n", "", lines) == ""
    assert "fio ended with 0\n" in report
    assert re.findall(r"err=.(\d+)", report) == ["0"]
    assert f"received {sent} " in report
    complaints = re.findall(r"kernel: \[ *[0-9.]+\] (.*)", report)
    assert [text for text in complaints if not re.match(SLOW, text)] == []
    console.take()
    *printed, _ = console.received.decode().split("\r\n")
    assert printed == [f"line {number}" for number in range(len(printed))]
    assert machine.stderr() == ""


def wait_for_progress(machine, console, echo):
    """See that all of it goes on, without another update."""
    returned = echo.count
    machine.seen = len(machine.serial)
    done = machine.expect(r"disk (\d+)\r?\n", STALL_S)[1].decode()
    machine.expect(rf"disk (?!{done}\D)\d+\r?\n", STALL_S)
    console.receive(console.take() + 1, keep=True, timeout=STALL_S)
    wait_until(lambda: echo.count > returned, "something comes back", STALL_S)
