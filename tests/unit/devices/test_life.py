"""The words for what happens to a device are the same in every layer."""

import ast
import re

from harness.sources import modules

from pyvmm.devices import base
from pyvmm.devices.virtio.device import VirtioDevice

WORDS = re.findall(r"^``(\w+)`` {2,}", base.__doc__, re.MULTILINE)
#: What a transport keeps apart for its device, or does itself.
TRANSPORTS = {"prepare", "quiesce", "unquiesce"}


def test_table_names_the_calls():
    assert len(WORDS) == len(set(WORDS)) == 10
    for word in WORDS:
        assert callable(base.Device.__dict__[word]), word
    for word in set(WORDS) - TRANSPORTS:
        assert callable(VirtioDevice.__dict__[word]), word
    assert not TRANSPORTS & set(dir(VirtioDevice))


def test_to_resume_is_what_vcpus_do():
    found = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.FunctionDef) and node.name == "resume"
    }
    assert {name.rpartition(".")[0] for name in found} == {"pyvmm.machine"}
