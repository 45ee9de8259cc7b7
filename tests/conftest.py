"""What every test gets: /dev/kvm demanded or skipped, and nothing left running afterwards."""

import functools
import os
import select
import signal
from pathlib import Path

import hypothesis
import pytest
from harness import Vm, lives, needs

from pyvmm._native import lib

pytest_plugins = ["nested.plugin"]

KVM_FOLDERS = {"kvm", "update", "upgrade", "faults", "linux"}
#: Set for the tests and inherited by whatever they start, also through execve.
SESSION_VARIABLE = "PYVMM_TEST_SESSION"
MACHINES = pytest.StashKey()

# How long an example takes says more about the host's load than about the code.
hypothesis.settings.register_profile("pyvmm", deadline=None)
hypothesis.settings.load_profile("pyvmm")


def pytest_configure():
    needs.take_disk_for_temporary_files()


def pytest_collection_modifyitems(config, items):
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        if folder in KVM_FOLDERS:
            item.add_marker(pytest.mark.kvm)
        if folder == "linux":
            item.add_marker(pytest.mark.linux)


def pytest_runtest_setup(item):
    if item.get_closest_marker("kvm") is None:
        return
    needs.device("/dev/kvm")


@pytest.fixture
def vm(request, tmp_path):
    """Makes and starts a :class:`harness.Vm` of the given arguments; ends it after the test.

    A second one gets a folder of its own.
    """
    machines = request.node.stash[MACHINES] = []

    def start(*options, **arguments):
        folder = tmp_path / f"vm{len(machines)}"
        folder.mkdir()
        machine = Vm(folder, *options, **arguments)
        machines.append(machine)
        return machine.start()

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture(params=lives.LIVES, ids=lambda life: life.name)
def any_vm(vm, request):
    """As ``vm``, for each of :data:`harness.lives.LIVES`, which the machine lives through
    wherever the test calls :meth:`harness.Vm.live`."""
    return functools.partial(vm, life=request.param)


@pytest.fixture
def bus(request, monkeypatch):
    """Where the virtio devices of the test's machines are, which say virtio-mmio: ``mmio`` or
    ``pci``. A test asks for both by ``@lives.BUSES``."""
    monkeypatch.setattr(Vm, "on_pci", request.param == "pci")
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and report.failed:
        for machine in item.stash.get(MACHINES, ()):
            report.sections += machine.sections()
    return report


@pytest.fixture(scope="session", autouse=True)
def run_directory(tmp_path_factory):
    """A run directory of the tests' own: what they kill leaves its entry there."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session", autouse=True)
def sigbus():
    """pytest's fault handler has taken the signal for itself."""
    lib.pyvmm_install_guard()


@pytest.fixture(scope="session", autouse=True)
def no_process_left():
    """Fail if a process that a test started outlives the session; end it."""
    mark = f"{os.getpid()}"
    os.environ[SESSION_VARIABLE] = mark
    yield
    left = [line for pid in started(mark) if (line := outlives(pid))]
    assert not left, "still running after the tests:\n" + "\n".join(left)


def started(mark):
    """Ids of the processes other than this one whose environment carries ``mark``."""
    entry = f"{SESSION_VARIABLE}={mark}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if entry in environment.split(b"\0"):
            yield int(process.name)


def outlives(pid, grace=30.0):
    """The command line of ``pid`` if it does not end within ``grace`` seconds, else ''."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return ""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if select.select([fd], [], [], grace)[0]:
            return ""
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        return f"{pid}: {command}"
    except (FileNotFoundError, ProcessLookupError):
        return ""
    finally:
        os.close(fd)
