"""The record of the way back: what is armed, and what is not of this exec."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import wayback
from pyvmm.cpr.handover import OWN, Handover
from pyvmm.cpr.state import CprState
from pyvmm.migration import rollback
from pyvmm.migration.incoming import take_failure


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """No test leaves a way back open, nor the hooks of one."""
    monkeypatch.setattr(wayback, "_record", None)
    monkeypatch.setattr(wayback.sys, "excepthook", wayback.sys.excepthook)
    monkeypatch.setattr(wayback.atexit, "register", lambda function: None)
    monkeypatch.setattr(wayback._signal, "signal", lambda number, handler: None)
    yield
    for name in (wayback.RECORD, wayback.STATE, wayback.FAILURE):
        os.environ.pop(name, None)


@pytest.fixture
def memfds():
    """Makes memfds."""
    made = []

    def make(data=b""):
        made.append(os.memfd_create("test"))
        os.write(made[-1], data)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def written(memfds, command=(b"pyvmm", b"run", b"-append", b"", b"\xff")):
    """Descriptors of a record and of its state."""
    record, state, program = memfds(), memfds(), memfds()
    wayback.write(record, wayback.Record(program, state, [state, program, record], [*command]))
    return record, state, program


def test_record_that_is_of_this_exec(memfds, monkeypatch):
    record, state, program = written(memfds)
    monkeypatch.setenv(wayback.RECORD, str(record))
    monkeypatch.setenv(wayback.STATE, str(state))
    wayback.arm()
    armed = wayback._record
    assert (armed.program, armed.state) == (program, state)
    assert armed.fds == [state, program, record]
    assert armed.command == [b"pyvmm", b"run", b"-append", b"", b"\xff"]
    assert wayback.RECORD not in os.environ
    assert wayback.close() == state
    assert not wayback.is_open()


def test_number_that_outlived_its_exec(memfds, monkeypatch):
    # An image that does not know the variable leaves it in the environment.
    record, state, _ = written(memfds)
    other = memfds(b"another state")
    os.dup2(other, state)
    monkeypatch.setenv(wayback.RECORD, str(record))
    monkeypatch.setenv(wayback.STATE, str(state))
    wayback.arm()
    assert not wayback.is_open()


@given(data=st.binary(max_size=200), number=st.text(max_size=5))
def test_what_is_no_record(data, number):
    for text in (number, None):
        fd = os.memfd_create("test")
        try:
            os.write(fd, data)
            os.environ[wayback.STATE] = str(fd)
            try:
                os.environ[wayback.RECORD] = str(fd) if text is None else text
            except ValueError:
                continue  # no environment holds it
            wayback.arm()
            assert not wayback.is_open()
        finally:
            os.close(fd)


def test_nowhere_to_go():
    wayback.attempt(ValueError("why"))  # returns
    assert wayback.close() is None


def test_way_back_to_an_image_that_wrote_no_record(memfds):
    exe, ram = memfds(), memfds()
    carried = CprState(
        {rollback.EXE: exe, ("pc.ram", 0): ram},
        {rollback.COMMAND: b"pyvmm\0run", "progress": b"1"},
    )
    rollback.adopt(carried)
    armed = wayback._record
    try:
        assert (armed.program, armed.command) == (exe, [b"pyvmm", b"run"])
        assert set(armed.fds) == {exe, ram, armed.state}
        assert rollback.COMMAND in carried.values  # nothing is changed before it must be
    finally:
        os.close(armed.state)


@pytest.mark.parametrize("is_told", [True, False])
def test_only_who_reads_it_is_told_by_the_environment(memfds, monkeypatch, is_told):
    """Another would hand it on, and the next image take it for its own."""
    executed = []
    monkeypatch.setattr(wayback.os, "execve", lambda *words: executed.append(words))
    monkeypatch.setattr(wayback, "_ATTEMPTS", 1)
    program, state = memfds(), memfds()
    monkeypatch.setattr(
        wayback, "_record", wayback.Record(program, state, [state], [b"pyvmm"], is_told=is_told)
    )
    wayback.attempt(ValueError("why"))
    ((_, command, environment),) = executed
    assert command == [b"pyvmm"]
    assert environment[wayback.STATE] == str(state)
    told = environment.get(wayback.FAILURE, "").partition("\n")[0]
    assert told == ("ValueError: why" if is_told else "")


def test_image_that_is_back_has_nowhere_else_to_go(memfds, monkeypatch):
    monkeypatch.setenv(wayback.FAILURE, "why\nwhere")
    rollback.adopt(CprState({rollback.EXE: memfds()}, {rollback.COMMAND: b"pyvmm"}))
    assert not wayback.is_open()
    assert take_failure(Handover()) == ("why", "where")
    assert take_failure(Handover()) == ("", "")


def test_failure_as_images_before_the_record_told_it():
    handover = Handover({}, {rollback.ERROR: b"why", "rollback/where": b"where", "progress": b"1"})
    assert take_failure(handover) == ("why", "where")
    assert take_failure(handover) == ("", "")
    assert handover.parcel(OWN, "progress").take_state() == b"1"
