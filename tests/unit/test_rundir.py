"""The run directory: names, the lock, what dead VMs leave, and what others may have put there."""

import os
import subprocess
import sys
import threading

import pytest
from harness import Deadline, needs
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import rundir
from pyvmm.errors import ConfigError, HostError

# Takes the name in a process of its own and says so; ends when its stdin does.
HOLDER = """
import sys
from pyvmm import rundir
entry = rundir.reserve(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """The run directory of one test, which is not there yet."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "pyvmm"


@pytest.fixture
def holder():
    """Starts a process that holds a name."""
    started = []

    def start(name):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# Names.


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1))
def test_a_name_becomes_a_file_name_and_back(name):
    encoded = rundir.encode_name(name)
    assert encoded.isascii()
    assert encoded.isprintable()
    assert "/" not in encoded
    assert encoded not in (".", "..")
    assert rundir.decode_name(encoded) == name


def test_usual_names_stay_as_they_are():
    for name in ("vm1", "a.b-c_d", "Web+1@host", "..hidden"):
        assert rundir.encode_name(name) == name
    assert rundir.encode_name("..") == "%2E%2E"


@given(st.text())
def test_any_file_name_can_be_shown(text):
    assert isinstance(rundir.decode_name(text), str)


@pytest.mark.parametrize("name", ["", "n" * 256, "ü" * 50])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="-name"):
        rundir.reserve(name)


# Where it is.


def test_the_directory_of_somebody_else_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert rundir.base() == "/tmp/pyvmm-4242"


@pytest.mark.parametrize("value", ["", "relative", "/nonexistent/runtime"])
def test_without_a_runtime_directory(monkeypatch, value):
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    uid = os.geteuid()
    assert rundir.base() in (f"/run/user/{uid}/pyvmm", f"/tmp/pyvmm-{uid}")


# The lock.


def test_entries_come_and_go(base):
    assert rundir.names() == []
    first, second = rundir.reserve("b"), rundir.reserve("a b")
    assert rundir.names() == ["a b", "b"]
    assert (base.stat().st_mode & 0o777, (base / "b").stat().st_mode & 0o777) == (0o700, 0o700)
    first.remove()
    assert rundir.names() == ["a b"]
    second.remove()
    assert list(base.iterdir()) == []


def test_a_name_is_taken_once(holder):
    process = holder("vm")
    entry = rundir.reserve("other")
    with pytest.raises(rundir.NameInUseError, match="another VM of that name is starting"):
        rundir.reserve("vm")
    rundir.Entry(rundir.directory("vm"), -1).write_info({"pid": process.pid})
    with pytest.raises(rundir.NameInUseError, match=f"process {process.pid} runs a VM"):
        rundir.reserve("vm")
    entry.remove()


def test_what_a_killed_process_left_is_taken_over(holder, base):
    process = holder("vm")
    (base / "vm" / "info").write_text(f"pid={process.pid}\n")
    (base / "vm" / "qmp.sock").touch()
    process.kill()
    process.wait()
    entry = rundir.reserve("vm")
    assert os.listdir(base / "vm") == ["lock"]
    entry.remove()


def test_what_a_killed_process_left_is_removed_by_a_look(holder, base):
    process, living = holder("vm"), holder("living")
    process.kill()
    process.wait()
    assert living.poll() is None
    assert rundir.names() == ["living"]
    assert os.listdir(base) == ["living"]


def test_the_lock_goes_through_an_exec(holder):
    entry = rundir.reserve("vm")
    os.set_inheritable(entry.lock_fd, True)
    code = f"""
import sys
from pyvmm import rundir
entry = rundir.inherit({entry.lock_fd})
print(entry.name, flush=True)
sys.stdin.read()
entry.remove()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        close_fds=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "vm\n"
    os.close(entry.lock_fd)
    with pytest.raises(rundir.NameInUseError):
        rundir.reserve("vm")
    process.communicate("")
    rundir.reserve("vm").remove()


def test_an_entry_that_was_removed_is_not_inherited(base):
    entry = rundir.reserve("vm")
    (base / "vm" / "lock").unlink()
    other = rundir.reserve("vm")
    assert rundir.inherit(entry.lock_fd) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(entry.lock_fd)
    assert rundir.names() == ["vm"]
    other.remove()


def test_the_end_of_a_vm_spares_an_entry_that_is_another_ones(base):
    entry = rundir.reserve("vm")
    (base / "vm" / "lock").unlink()
    other = rundir.reserve("vm")
    entry.remove()
    assert rundir.names() == ["vm"]
    other.remove()


def test_a_lock_that_a_cleaner_removed_meanwhile_is_none(monkeypatch, base):
    real = rundir.try_lock

    def late(fd):
        monkeypatch.setattr(rundir, "try_lock", real)
        (base / "vm" / "lock").unlink()
        (base / "vm").rmdir()
        return real(fd)

    monkeypatch.setattr(rundir, "try_lock", late)
    entry = rundir.reserve("vm")
    assert rundir.names() == ["vm"]
    with pytest.raises(rundir.NameInUseError):
        rundir.reserve("vm")
    entry.remove()


def test_a_name_that_a_cleaner_holds_for_a_moment_is_waited_for(monkeypatch):
    left = rundir.reserve("vm")
    left.write_info({"pid": (1 << 31) - 1})  # of a process that is no more
    real = rundir.time.sleep

    def slept(seconds):
        monkeypatch.setattr(rundir.time, "sleep", real)
        left.remove()

    monkeypatch.setattr(rundir.time, "sleep", slept)
    rundir.reserve("vm").remove()
    assert rundir.time.sleep is real


def test_nobody_has_a_name_together_with_another():
    """Starts, ends and looks that race: at most one has the name, whoever cleans up."""
    holders, crowds, failures, taken = [], [], [], []
    deadline, last = Deadline(2), Deadline()

    def guarded(work):
        try:
            while not deadline.over or (len(taken) <= 10 and not last.over):
                work()
        except Exception as error:
            failures.append(error)

    def start_and_end():
        try:
            entry = rundir.reserve("vm")
        except rundir.NameInUseError:
            return
        holders.append(entry)
        if len(holders) > 1:
            crowds.append(len(holders))
        taken.append(entry.name)
        holders.remove(entry)
        entry.remove()

    works = [start_and_end] * 4 + [rundir.names] * 2
    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not crowds
    assert len(taken) > 10


# What others may have put there.


@pytest.mark.parametrize("inside", [False, True])
def test_a_symlink_is_refused(base, tmp_path, inside):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if inside:
        base.mkdir(mode=0o700)
    (base / "vm" if inside else base).symlink_to(elsewhere)
    with pytest.raises(HostError, match="is no directory; remove it"):
        rundir.reserve("vm")
    assert list(elsewhere.iterdir()) == []
    if inside:
        assert rundir.names() == []
    else:
        with pytest.raises(HostError, match="is no directory"):
            rundir.names()


@pytest.mark.parametrize("mode", [0o770, 0o701, 0o777])
def test_a_directory_that_is_open_to_others_is_refused(base, mode):
    base.mkdir()
    base.chmod(mode)
    with pytest.raises(HostError, match=f"open to others \\(mode {mode:o}, not 700\\)"):
        rundir.reserve("vm")


def test_a_directory_of_somebody_else_is_refused(base):
    needs.root("to give a directory away")
    base.mkdir(mode=0o700)
    os.chown(base, 4242, -1)
    with pytest.raises(HostError, match="belongs to user 4242"):
        rundir.reserve("vm")


def test_a_lock_that_is_a_symlink_is_refused(base, tmp_path):
    (base / "vm").mkdir(parents=True, mode=0o700)
    base.chmod(0o700)
    precious = tmp_path / "precious"
    (base / "vm" / "lock").symlink_to(precious)
    with pytest.raises(HostError, match="vm: "):
        rundir.reserve("vm")
    assert not precious.exists()
    assert rundir.names() == []


def test_a_lock_that_is_a_pipe_does_not_block(base):
    (base / "vm").mkdir(parents=True, mode=0o700)
    base.chmod(0o700)
    os.mkfifo(base / "vm" / "lock")
    rundir.reserve("vm").remove()
    assert os.listdir(base) == []


def test_files_that_are_not_the_entrys_own_are_spared(base):
    entry = rundir.reserve("vm")
    (base / "vm" / "notes").write_text("mine")
    entry.remove()
    assert os.listdir(base / "vm") == ["notes"]
    assert rundir.names() == []
    rundir.reserve("vm").remove()


def test_info_is_read_back():
    entry = rundir.reserve("vm")
    assert rundir.read_info(entry.path) == {}
    entry.write_info({"pid": 1, "version": "1.2.3"})
    entry.write_info({"pid": 23, "version": "1.2.4"})
    assert rundir.read_info(entry.path) == {"pid": 23, "version": "1.2.4"}
    entry.remove()


@given(st.binary())
def test_any_info_can_be_read(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "info").write_bytes(data)
    for value in rundir.read_info(folder).values():
        assert isinstance(value, int | str)
        assert rundir.is_alive(value) in (True, False)


def test_info_that_is_a_pipe_or_a_symlink_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "info")
    assert rundir.read_info(tmp_path) == {}
    (tmp_path / "info").unlink()
    (tmp_path / "text").write_text("pid=1\n")
    (tmp_path / "info").symlink_to("text")
    assert rundir.read_info(tmp_path) == {}
