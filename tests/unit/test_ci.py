"""What the gate runs is there: a file that was renamed would end it before its first test."""

import re

from harness.sources import ROOT


def smoke():
    """The words of the list of tests that fresh machines run."""
    text = (ROOT / ".ci" / "fresh").read_text()
    (virtio,) = re.findall(r"^VIRTIO=(\S+)$", text, re.MULTILINE)
    (words,) = re.findall(r'^SMOKE="([^"]+)"$', text, re.MULTILINE)
    return words.replace("$VIRTIO", virtio).split()


def test_tests_of_fresh_machines_are_there():
    assert len(smoke()) > 10
    for path, _, name in (word.partition("::") for word in smoke()):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name
