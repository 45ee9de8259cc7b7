"""query-block and info block over real images."""

from types import SimpleNamespace

import pytest

from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlockOptions

SIZE = 1 << 20


@pytest.fixture
def disks(machine, tmp_path):
    """A drive with a device, a node with one, and one of each without."""
    options = BlockOptions()
    paths = [tmp_path / f"{name}.img" for name in "abcd"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    options.add_drive(f"file={paths[0]},if=none,id=sys,cache=none,format=raw")
    options.add_drive(f"file={paths[1]},if=none,id=spare,cache=unsafe,readonly=on")
    options.add_blockdev(f"driver=file,node-name=data,filename={paths[2]}")
    options.add_blockdev(f"driver=file,node-name=unused,filename={paths[3]}")
    for config in options.complete():
        machine.drives[config.id] = BlockFile(config, machine.handover)
    for drive, cache, id, status in (("data", False, "vdb", "nospace"), ("sys", True, "", "ok")):
        properties = {"drive": drive, "write-cache": cache, "io-status": status}
        machine.devices.append(
            SimpleNamespace(name="virtio-blk-device", id=id, properties=lambda p=properties: p)
        )
    return paths


def test_info_block(run, disks):
    assert run("info block") == (
        f"sys: {disks[0]} (raw)\n"
        "    Attached to:      /machine/unattached/device[2]\n"
        "    Cache mode:       writeback, direct\n"
        "\n"
        f"spare: {disks[1]} (raw, read-only)\n"
        "    Cache mode:       writeback, ignore flushes\n"
        "\n"
        f"data: {disks[2]} (raw)\n"
        "    Attached to:      vdb\n"
        "    I/O status:       nospace\n"
        "    Cache mode:       writethrough\n"
    )


def test_query_block(context, disks):
    first, second, third = context.execute("query-block")
    assert (first["device"], first["inserted"]["image"]["virtual-size"]) == ("sys", SIZE)
    assert context.execute("qom-get", {"path": first["qdev"], "property": "drive"}) == "sys"
    assert "qdev" not in second
    assert (third["device"], third["inserted"]["node-name"]) == ("", "data")
    assert third["inserted"]["cache"] == {"writeback": False, "direct": False, "no-flush": False}


def test_no_disks(run):
    assert run("info block") == ""
