"""query-qmp-schema: whole, and true of what commands take and return."""

import ast
from pathlib import Path

import pytest

import pyvmm
from pyvmm.monitor.qmp.schema import EVENTS

PACKAGE = Path(pyvmm.__file__).parent
JSON_TYPES = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "value": lambda value: True,
}


class Schema:
    """What a client makes of the reply."""

    def __init__(self, entries):
        self.entries = {entry["name"]: entry for entry in entries}
        assert len(self.entries) == len(entries), "a name is there twice"

    def conforms(self, value, name):
        entry = self.entries[name]
        kind = entry["meta-type"]
        if kind == "builtin":
            return JSON_TYPES[entry["json-type"]](value)
        if kind == "enum":
            return value in entry["values"]
        if kind == "array":
            element = entry["element-type"]
            return isinstance(value, list) and all(self.conforms(one, element) for one in value)
        members = {member["name"]: member for member in entry["members"]}
        needed = {name for name, member in members.items() if "default" not in member}
        return (
            isinstance(value, dict)
            and needed <= value.keys() <= members.keys()
            and all(self.conforms(inner, members[key]["type"]) for key, inner in value.items())
        )


@pytest.fixture
def schema(context):
    return Schema(context.execute("query-qmp-schema"))


def test_every_type_that_is_referred_to_is_there(schema):
    for entry in schema.entries.values():
        kind = entry["meta-type"]
        if kind in ("command", "event"):
            assert schema.entries[entry["arg-type"]]["meta-type"] == "object"
        if kind == "command":
            assert entry["ret-type"] in schema.entries
        elif kind == "array":
            assert entry["name"] == f"[{entry['element-type']}]"
            assert entry["element-type"] in schema.entries
        elif kind == "object":
            assert all(member["type"] in schema.entries for member in entry["members"])
        elif kind == "enum":
            assert [member["name"] for member in entry["members"]] == entry["values"]


def test_every_command_is_there(schema, context):
    found = {name for name, entry in schema.entries.items() if entry["meta-type"] == "command"}
    assert found == set(context.registry.commands)
    assert schema.entries["quit"]["allow-oob"] is True
    assert "allow-oob" not in schema.entries["stop"]


def test_what_queries_return_is_what_they_say(schema, context):
    for name in context.registry.commands:
        if name.startswith(("query-", "x-query-")):
            value = context.execute(name)
            assert schema.conforms(value, schema.entries[name]["ret-type"]), (name, value)


def test_the_check_notices(schema):
    returned = schema.entries["query-status"]["ret-type"]
    assert schema.conforms({"status": "paused", "running": False}, returned)
    for wrong in (
        {"status": "paused"},
        {"status": "paused", "running": False, "more": 1},
        {"status": "resting", "running": False},
        {"status": "paused", "running": 0},
        [],
    ):
        assert not schema.conforms(wrong, returned)


def test_arguments(schema):
    def members(command):
        entry = schema.entries[schema.entries[command]["arg-type"]]
        return {member["name"]: member for member in entry["members"]}

    assert members("stop") == {}
    assert members("migrate")["uri"] == {"name": "uri", "type": "str", "default": None}
    assert members("chardev-add")["id"] == {"name": "id", "type": "str"}
    assert members("migrate-set-parameters")["cpr-exec-command"]["type"] == "[str]"
    mode = members("migrate-set-parameters")["mode"]["type"]
    assert "cpr-exec" in schema.entries[mode]["values"]


def test_every_event_that_is_emitted_is_there(schema):
    emitted = {
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        if "testing" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "emit"
        and isinstance(node.args[0], ast.Constant)
    }
    found = {name for name, entry in schema.entries.items() if entry["meta-type"] == "event"}
    assert emitted == found == set(EVENTS)
