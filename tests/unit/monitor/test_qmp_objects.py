"""Chardevs made over QMP, the object tree, and descriptors that clients pass."""

import array
import json
import os
import socket

import pytest
from harness.process import descriptors

from pyvmm.chardev.address import UnixAddress
from pyvmm.chardev.config import parse_chardev
from pyvmm.chardev.factory import ChardevSet
from pyvmm.chardev.rights import MAX_FDS
from pyvmm.chardev.socket import SocketChardev
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import ADDED, CLIENT, Handover
from pyvmm.errors import CommandError
from pyvmm.monitor.qmp.session import QmpSession
from pyvmm.monitor.registry import DeviceNotFound


def refused(context, name, **arguments):
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    with pytest.raises(CommandError) as caught:
        context.execute(name, arguments)
    return str(caught.value)


# --- chardevs ----------------------------------------------------------------------------------


def add(context, id, kind, **data):
    return context.execute("chardev-add", {"id": id, "backend": {"type": kind, "data": data}})


def listed(context):
    return {one["label"]: one for one in context.execute("query-chardev")}


def test_chardevs_are_added_and_removed(context, tmp_path):
    path = str(tmp_path / "a,b")
    assert add(context, "n", "null") == {}
    assert add(context, "f", "file", out=path, append=True) == {}
    assert add(context, "r", "ringbuf", size=4096) == {}
    pty = add(context, "p", "pty")["pty"]
    assert os.path.exists(pty)
    add(context, "s", "socket", addr={"type": "unix", "data": {"path": str(tmp_path / "s")}})
    found = listed(context)
    assert found["n"] == {"label": "n", "filename": "null", "frontend-open": False}
    assert found["p"]["filename"] == f"pty:{pty}"
    assert found["s"]["filename"] == f"disconnected:unix:{tmp_path}/s,server=on"
    assert os.path.exists(path)
    for id in "nfrps":
        assert context.execute("chardev-remove", {"id": id}) is None
    assert listed(context) == {}
    assert not os.path.exists(tmp_path / "s")


def test_chardevs_that_cannot_be(context):
    add(context, "n", "null")
    where = "backend.data"
    assert refused(context, "chardev-add", id="n", backend={"type": "null", "data": {}}) == (
        "Chardev with id 'n' already exists"
    )
    for backend, text in (
        ({}, "Parameter 'backend.type' is missing"),
        ({"type": 1}, "Invalid parameter type for 'backend.type', expected: string"),
        ({"type": "vc"}, "Parameter 'backend.type' does not accept value 'vc'"),
        ({"type": "null", "x": 1}, "Parameter 'backend.x' is unexpected"),
        ({"type": "null", "data": {"x": 1}}, f"Parameter '{where}.x' is unexpected"),
        ({"type": "file"}, f"Parameter '{where}.out' is missing"),
        (
            {"type": "file", "data": {"out": 1}},
            f"Invalid parameter type for '{where}.out', expected: string",
        ),
        ({"type": "socket", "data": {"addr": {}}}, f"Parameter '{where}.addr.type' is missing"),
        (
            {"type": "socket", "data": {"addr": {"type": "vsock", "data": {}}}},
            f"Parameter '{where}.addr.type' does not accept value 'vsock'",
        ),
        (
            {"type": "socket", "data": {"addr": {"type": "inet", "data": {"host": "h"}}}},
            f"Parameter '{where}.addr.data.port' is missing",
        ),
    ):
        assert refused(context, "chardev-add", id="x", backend=backend) == text
    for options in ({"size": -1}, {"size": 1 << 60}):
        with pytest.raises(Exception, match="chardev-add"):
            add(context, "x", "ringbuf", **options)
    with pytest.raises(Exception, match="no name"):
        add(context, "1,x=y", "null")
    with pytest.raises(Exception, match="/nowhere/x"):
        add(context, "x", "file", out="/nowhere/x")
    assert list(listed(context)) == ["n"]


def test_chardevs_that_stay(context, machine):
    assert refused(context, "chardev-remove", id="x") == "Chardev 'x' not found"
    config = parse_chardev("null,id=serial0")
    machine.chardevs.create(config)
    assert refused(context, "chardev-remove", id="serial0") == (
        "Chardev 'serial0' is of the command line and stays"
    )
    machine.chardevs.claim(parse_chardev("null,id=other"))
    assert refused(context, "chardev-remove", id="other") == "Chardev 'other' is busy"


def test_a_mux_is_open_once_one_of_its_users_is(context, machine):
    machine.chardevs.create(parse_chardev("null,id=m,mux=on"))
    assert listed(context)["m"]["frontend-open"] is False
    assert listed(context)["m-base"]["frontend-open"] is True
    port = machine.chardevs._muxes["m"].frontend_chardev(0)
    port.attach(QmpSession(port, context))
    assert listed(context)["m"]["frontend-open"] is True


def test_added_chardevs_live_through_an_update(tmp_path):
    loop, handover = EventLoop(), Handover()
    old = ChardevSet(loop, handover, lambda: None)
    old.create(parse_chardev("null,id=serial0"))
    old.add(parse_chardev(f"file,id=f,path={tmp_path}/a,,b"))
    old.add(parse_chardev("ringbuf,id=r"))
    old.get("r").write(b"kept")
    assert old.get("f").write(b"one ") == 4
    states, kept = handover.states(), handover.kept()
    assert set(states) == {"chardev-added/f", "chardev-added/r"}
    new = ChardevSet(loop, Handover(kept, states), lambda: None)
    new.create(parse_chardev("null,id=r"))  # the new command line took a name
    (problem,) = new.load_added()
    assert "the name r is in use" in problem
    new.get("f").write(b"two")
    assert (tmp_path / "a,b").read_text() == "one two"
    new.close()
    for state in ({"x": b""}, {"x": b"null,id=\0"}, {"x": b"\xff,id=x\0y"}):
        states = {f"{ADDED}/{id}": value for id, value in state.items()}
        other = ChardevSet(loop, Handover({}, states), lambda: None)
        assert len(other.load_added()) == 1
    loop.close()


# --- objects -----------------------------------------------------------------------------------


def test_the_object_tree(context, machine):
    machine.chardevs.create(parse_chardev("null,id=serial0"))

    def names(path):
        return {one["name"]: one["type"] for one in context.execute("qom-list", {"path": path})}

    def get(path, name):
        return context.execute("qom-get", {"path": path, "property": name})

    assert names("/")["machine"] == "child<pyvmm-machine>"
    assert names("/objects") == {
        "type": "string",
        "ram0": "child<memory-backend-memfd>",
    }
    assert names("/machine/cpu[1]") == {"type": "string", "apic-id": "int"}
    for cpu in context.execute("query-cpus-fast"):
        assert get(cpu["qom-path"], "type") == "host-x86_64-cpu"
    assert names("/objects/ram0")["share"] == "bool"
    assert get("/objects/ram0", "size") == 1 << 20
    assert get("/machine/unattached/device[0]", "iobase") == 0x3F8
    assert get("/chardevs/serial0", "filename") == "null"
    assert get("/", "machine") == "/machine"
    assert get("/machine/", "unattached") == "/machine/unattached"


def test_objects_that_are_not_there(context):
    for path in ("", "machine", "/nowhere", "/machine/type"):
        with pytest.raises(DeviceNotFound, match=f"^Device '{path}' not found$"):
            context.execute("qom-list", {"path": path})
    assert refused(context, "qom-get", path="/machine", property="x") == (
        "Property 'pyvmm-machine.x' not found"
    )


# --- descriptors -------------------------------------------------------------------------------


class SocketClient:
    """A client on a real Unix socket, which can pass descriptors."""

    def __init__(self, context, folder):
        machine = context.machine
        self.loop = machine.loop
        address = UnixAddress(str(folder / "qmp"), "-qmp")
        self.chardev = SocketChardev(
            "qmp0", self.loop, machine.handover, address=address, server=True, wait=False
        )
        self.session = QmpSession(self.chardev, context)
        self.chardev.attach(self.session)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(folder / "qmp"))
        self.sock.setblocking(False)
        assert "QMP" in self.execute(None)
        assert self.execute("qmp_capabilities") == {"return": {}}

    def execute(self, name, fds=(), **arguments):
        if name is not None:
            arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
            text = json.dumps({"execute": name, "arguments": arguments}).encode()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self.sock.sendmsg([text], rights if fds else [])
        data = b""
        while not data.endswith(b"\r\n"):
            self.loop.run_once(1)
            try:
                data += self.sock.recv(65536)
            except BlockingIOError:
                continue
        return json.loads(data)

    def close(self):
        self.sock.close()
        self.loop.run_once(1)


@pytest.fixture
def client(context, tmp_path):
    client = SocketClient(context, tmp_path)
    yield client
    client.sock.close()
    client.chardev.close()
    client.session.close()
    handover = context.machine.handover
    for (id, index), fd in handover.kept_of(CLIENT).items():
        handover.parcel(CLIENT, id).close(fd, index)
    handover.settle()


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def open_fds():
    return len(descriptors("self"))


def text(reply):
    return reply["error"]["desc"]


def test_named_descriptors(client, pipe):
    before = open_fds()
    assert client.execute("getfd", [pipe[1]], fdname="out") == {"return": {}}
    ((id, _), kept) = client.session.context.machine.handover.kept_of(CLIENT).popitem()
    assert id.startswith("name/")
    assert not os.get_inheritable(kept)
    os.write(kept, b"x")
    assert os.read(pipe[0], 1) == b"x"
    assert client.execute("getfd", [pipe[0]], fdname="out") == {"return": {}}
    assert open_fds() == before + 1  # the first was closed
    assert client.execute("closefd", fdname="out") == {"return": {}}
    assert text(client.execute("closefd", fdname="out")) == (
        "File descriptor named 'out' not found"
    )
    assert open_fds() == before


def test_descriptors_that_are_refused_are_closed(client, pipe):
    before = open_fds()
    assert text(client.execute("getfd", fdname="x")) == (
        "No file descriptor supplied via SCM_RIGHTS"
    )
    for name in ("1x", "", "x" * 101):
        assert "'fdname' expects" in text(client.execute("getfd", [pipe[0]], fdname=name))
    assert "non-negative" in text(client.execute("add-fd", [pipe[0]], fdset_id=-1))
    assert "'opaque' expects" in text(client.execute("add-fd", [pipe[0]], opaque="ü" * 60))
    assert open_fds() == before


def test_sets(client, pipe):
    one = client.execute("add-fd", [pipe[0]])["return"]
    two = client.execute("add-fd", [pipe[1]], fdset_id=0, opaque="rw:/päth")["return"]
    other = client.execute("add-fd", [pipe[1]], fdset_id=7)["return"]
    assert (one["fdset-id"], two["fdset-id"], other["fdset-id"]) == (0, 0, 7)
    assert client.execute("add-fd", [pipe[1]])["return"]["fdset-id"] == 1
    found = client.execute("query-fdsets")["return"]
    assert [entry["fdset-id"] for entry in found] == [0, 1, 7]
    assert {"fd": one["fd"]} in found[0]["fds"]
    assert {"fd": two["fd"], "opaque": "rw:/päth"} in found[0]["fds"]
    assert client.execute("remove-fd", fdset_id=0, fd=one["fd"]) == {"return": {}}
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(one["fd"])
    for arguments in ({"fdset_id": 0, "fd": one["fd"]}, {"fdset_id": 3}):
        assert "not found" in text(client.execute("remove-fd", **arguments))
    for id in (0, 1, 7):
        client.execute("remove-fd", fdset_id=id)
    assert client.execute("query-fdsets") == {"return": []}


def test_descriptors_that_nobody_asks_for_are_few_and_go_with_the_client(client, pipe):
    before = open_fds()
    for _ in range(3):
        client.execute("query-name", [pipe[0]] * MAX_FDS)
    assert open_fds() == before + MAX_FDS
    client.execute("query-name", [pipe[0]] * 200)
    assert open_fds() == before + MAX_FDS
    client.close()
    assert open_fds() == before - 2  # both ends of the connection


def test_descriptors_live_through_an_update(client, pipe, context):
    client.execute("getfd", [pipe[0]], fdname="in")
    number = client.execute("add-fd", [pipe[1]], opaque="a=b")["return"]["fd"]
    client.execute("query-name", [pipe[1]])
    store = Handover(context.machine.handover.kept())
    client.session._rights._waiting.clear()  # as if by the exec: they are the new image's
    store.keep_all(CLIENT)
    context.machine.handover = store
    assert context.execute("query-fdsets") == [
        {"fdset-id": 0, "fds": [{"fd": number, "opaque": "a=b"}]}
    ]
    # What waited for a command still waits.
    QmpSession(client.chardev, context)
    assert context.execute("add-fd")["fdset-id"] == 1
    context.execute("closefd", {"fdname": "in"})
    assert "not found" in refused(context, "closefd", fdname="in")


def test_names_that_are_not_ours_do_no_harm(context):
    fd = os.open("/dev/null", os.O_RDONLY)
    context.machine.handover = Handover({("client-fd/set/x=zz", 0): fd})
    context.machine.handover.keep_all(CLIENT)
    assert context.execute("query-fdsets") == []
    assert context.machine.handover.kept_of(CLIENT) == {("set/x=zz", 0): fd}
    os.close(fd)
