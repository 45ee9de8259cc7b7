"""Faults are injected into functions by name: one that was renamed would inject nothing."""

import importlib
import re

from harness.sources import ROOT


def named(text):
    """``module:function`` or ``module:Class.method`` of the product, in a source."""
    return re.findall(r'"(pyvmm(?:\.\w+)+):(\w+(?:\.\w+)*)"', text)


def exists(module, path):
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None


def test_places_of_faults_are_there():
    places = {
        place
        for path in sorted((ROOT / "tests" / "faults").glob("*.py"))
        for place in named(path.read_text())
    }
    assert len(places) > 30
    assert [place for place in sorted(places) if not exists(*place)] == []


def test_place_that_is_not_there_is_found():
    assert named('fault("pyvmm.cli:serve", "x")') == [("pyvmm.cli", "serve")]
    assert exists("pyvmm.cli", "serve")
    assert not exists("pyvmm.cli", "serve.nothing")
