import os

import pytest
from harness.virtio_disk import SIZE, Disk
from harness.virtio_echo import Echo
from harness.virtio_network import Network

from pyvmm.devices.virtio import fastpath
from pyvmm.testing.virtio_driver import VirtioDriver


@pytest.fixture
def plug():
    """Puts a driver over a device."""
    made = []

    def plug(device, **options):
        made.append(VirtioDriver(device, **options))
        return made[-1]

    yield plug
    for driver in made:
        driver.close()


@pytest.fixture(params=["disk", "tmpfs", "direct"])
def kind(request):
    """Where the image is: what is done on the loop and what by workers differs."""
    return request.param


@pytest.fixture
def disk(tmp_path, request):
    """Makes a disk of 1 MiB: ``disk(contents, image={...}, **properties)``."""
    made = []
    kind = request.getfixturevalue("kind") if "kind" in request.fixturenames else "disk"

    def make(contents=None, **arguments):
        path = tmp_path / "disk.img"
        if kind == "tmpfs":
            path = f"/dev/shm/pyvmm-{os.getpid()}-{tmp_path.name}.img"
        if kind == "direct":
            arguments["image"] = {"direct": True, **arguments.get("image", {})}
        with open(path, "wb") as file:
            file.write(bytes(SIZE) if contents is None else contents)
        made.append(Disk(path, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()
        os.unlink(one.config.filename)


@pytest.fixture
def python_only(monkeypatch):
    """No disk request is served natively: what a test puts in the place of Python's is called."""
    monkeypatch.setattr(fastpath, "serve", lambda *_, **__: 0)


@pytest.fixture
def network():
    made = []

    def make(**options):
        made.append(Network(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def echo(loop, plug):
    """A driver over an echo device that has started."""
    driver = plug(Echo(loop))
    driver.start()
    return driver
