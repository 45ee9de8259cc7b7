import pytest

from pyvmm.core import runstate
from pyvmm.core.runstate import TRANSITIONS, RunState
from pyvmm.errors import StateError

STATES = sorted(TRANSITIONS)


def test_table_names_only_states_that_are_in_it():
    assert set().union(*TRANSITIONS.values()) <= set(STATES)
    assert {
        value for name, value in vars(runstate).items() if name.isupper() and isinstance(value, str)
    } == set(STATES)


@pytest.mark.parametrize("old", STATES)
@pytest.mark.parametrize("new", STATES)
def test_transitions_are_those_of_the_table(old, new):
    state, seen = RunState(old), []
    state.observe(lambda *change: seen.append(change))
    if new == old:
        state.set(new)
        assert (state.state, seen) == (old, [])
    elif new in TRANSITIONS[old]:
        state.set(new)
        assert (state.state, seen) == (new, [(old, new)])
    else:
        with pytest.raises(StateError, match=f"from {old} to {new}"):
            state.set(new)
        assert (state.state, seen) == (old, [])


@pytest.mark.parametrize("name", STATES)
def test_what_a_state_means(name):
    state = RunState(name)
    assert state.running == (name == "running")
    assert state.needs_reset() == (name in ("shutdown", "internal-error"))
    # Without a reset there is no way straight back to a running guest.
    if state.needs_reset():
        assert "running" not in TRANSITIONS[name]
        assert "prelaunch" in TRANSITIONS[name]


@pytest.mark.parametrize("name", sorted(set(STATES) - {"inmigrate"}))
def test_an_update_can_begin_in_any_state_and_be_undone(name):
    state = RunState(name)
    state.set("finish-migrate")
    state.set(name)
    assert state.state == name


@pytest.mark.parametrize("name", sorted(set(STATES) - {"inmigrate", "finish-migrate"}))
def test_a_load_can_end_in_any_state(name):
    state = RunState("inmigrate")
    state.set(name)
    assert state.state == name


def test_observers_are_called_in_order_and_see_the_new_state():
    state, seen = RunState(), []
    for name in "ab":
        state.observe(lambda *_, name=name: seen.append((name, state.state)))
    state.set("running")
    assert seen == [("a", "running"), ("b", "running")]
