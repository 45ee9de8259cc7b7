"""Output that an update comes into the middle of: no byte is lost, repeated or out of its order,
though it is written in batches."""

import contextlib
import threading

import pytest
from harness import lives, wait_until
from harness.stream import Peer

LINES = 300


def numbers(data):
    """Those of all lines that are whole; the lines have nothing else."""
    lines = bytes(data).split(b"\r\n")[:-1]
    assert all(line.startswith(b"line ") for line in lines[1:]), lines[:3]
    return [int(line.removeprefix(b"line ")) for line in lines if line.startswith(b"line ")]


def assert_whole(data, least):
    found = numbers(data)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= least


@contextlib.contextmanager
def read_all(peer):
    """Read all along: what a reader that is slow does not take a debug console drops."""
    ended = threading.Event()

    def read():
        while not ended.wait(0.001):
            peer.take()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_burst_on_the_serial_port(any_vm):
    machine = any_vm(append="serial lines")
    for at in range(1, 4):
        machine.expect(rf"line {at * LINES}\r\n")
        machine.live()
    machine.expect(rf"line {4 * LINES}\r\n")
    machine.hmp_quit()
    assert_whole(machine.serial, 4 * LINES)


@lives.CONNECTED
def test_a_burst_on_the_debug_console(any_vm, tmp_path):
    with Peer(tmp_path, "debug") as peer:
        machine = any_vm(
            *("-chardev", peer.option, "-device", "isa-debugcon,chardev=debug"),
            append="serial lines console=debugcon",
        )
        with read_all(peer):
            for at in range(1, 4):
                wait_until(lambda at=at: len(peer.received) > at * 5000, "the guest's output")
                machine.live()
            wait_until(lambda: len(peer.received) > 20000, "the guest's output")
            machine.hmp("stop")
        peer.rest()
        assert_whole(peer.received, 1000)


@lives.CONNECTED
def test_a_reader_that_has_stopped_reading(any_vm, tmp_path):
    """What it has not taken goes over, be it more than a FIFO has room for."""
    with Peer(tmp_path, "con") as peer:
        machine = any_vm(
            *("-chardev", peer.option, "-serial", "chardev:con"),
            append="serial lines",
            serial=False,
        )
        for _ in range(2):
            peer.wait_full()
            machine.live()
            # Far beyond what the socket had.
            count = peer.take()
            wait_until(lambda count=count: peer.take() > count + 10000, "the guest's output")
        machine.hmp("stop")
        peer.rest()
        assert_whole(peer.received, 1000)


@pytest.mark.parametrize("way", ["quit", "stop"])
def test_all_that_was_sent_is_there_at_the_end(vm, tmp_path, way):
    """The guest stands: its last line is out, though nobody waited for it."""
    machine = vm(append="serial lines")
    machine.expect(rf"line {LINES}\r\n")
    machine.hmp("stop")
    if way == "quit":
        machine.hmp_quit()
    assert_whole(machine.serial, LINES)
