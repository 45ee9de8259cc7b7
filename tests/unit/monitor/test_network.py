"""What the monitors say of networks; devices and back ends are real ones."""

import pytest

from pyvmm.backends.net.config import parse_netdev
from pyvmm.backends.net.factory import NetdevSet
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.errors import CommandError
from pyvmm.testing.virtio_driver import VirtioDriver


@pytest.fixture
def networks(machine, tmp_path):
    """Two back ends, a device with an id on the second."""
    machine.netdevs = NetdevSet(machine.loop, machine.handover)
    for id in ("n0", "n1"):
        option = f"stream,id={id},server=on,addr.type=unix,addr.path={tmp_path}/{id}"
        machine.netdevs.create(parse_netdev(option))
    mac = bytes.fromhex("525400abcdef")
    driver = VirtioDriver(VirtioNet(machine.loop, machine.netdevs.get("n1"), mac))
    machine.devices.append(driver.transport)
    yield driver
    driver.close()
    machine.netdevs.close()


def test_info_network(run, networks, tmp_path):
    lines = [
        f"n0: index=0,type=stream,server=unix:{tmp_path}/n0,state=disconnected",
        "virtio-net-device.0: index=0,type=nic,model=virtio-net-device,macaddr=52:54:00:ab:cd:ef",
        f" \\ n1: index=0,type=stream,server=unix:{tmp_path}/n1,state=disconnected",
    ]
    assert run("info network") == "".join(f"{line}\n" for line in lines)


def test_rx_filter(context, networks):
    networks.transport.id = "eth0"
    (found,) = context.execute("query-rx-filter")
    assert (found["name"], found["main-mac"]) == ("eth0", "52:54:00:ab:cd:ef")
    assert found["promiscuous"] is True
    assert context.execute("query-rx-filter", {"name": "eth0"}) == [found]
    with pytest.raises(CommandError, match="invalid net client name: eth1"):
        context.execute("query-rx-filter", {"name": "eth1"})


def test_machine_without_networks(run, context):
    assert run("info network") == ""
    assert context.execute("query-rx-filter") == []
