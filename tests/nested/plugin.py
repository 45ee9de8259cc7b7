"""pytest plugin: runs the tests where Linux boots, those of the folder ``linux``.

If this host's /dev/kvm can run an unmodified Linux, it does nothing. If not, these tests are
collected here, but after all others a second pytest runs them in a nested machine; its reports
come over as it makes them and are shown, counted and written as if they were this one's. A test
that takes the machine down fails; the rest go on in a new machine.

The same module is the second pytest's plugin, which prints the reports (``PYVMM_NESTED=inside``).
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nested import kvm
from nested.machine import NestedMachine
from nested.packages import MissingError
from nested.port import NestedError

ROLE = "PYVMM_NESTED"
#: Before each report in the second pytest's output; what else is there, tests printed.
MARK = "\x1enested-report "
#: Seconds that a test may take inside, and that its own deadlines are set to.
TEST_S, DEADLINE_S = 600, 240


def pytest_addoption(parser):
    parser.addoption(
        "--linux-kvm",
        choices=["auto", "here", "nested"],
        default="auto",
        help="where Linux boots: on this host's KVM, in a nested machine, or as this host's allows",
    )
    parser.addoption("--nested-log", metavar="FOLDER", help="keep the nested machine's logs there")


def pytest_configure(config):
    if os.environ.get(ROLE) == "inside":
        config.pluginmanager.register(_Inside(config), "nested-inside")
    else:
        config.pluginmanager.register(_Outside(config), "nested-outside")


class _Inside:
    def __init__(self, config):
        self._config = config
        # Behind pytest's own capturing of standard output.
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(f"\n{MARK}{json.dumps(data)}", file=self._stream, flush=True)


class _Outside:
    def __init__(self, config):
        self._config = config
        self._items = {}
        self._pending = b""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        linux = [item for item in session.items if item.get_closest_marker("linux")]
        if self._config.option.collectonly or not linux or not self._nested_wanted():
            return (yield)
        everything = session.items
        session.items = [item for item in everything if item not in linux]
        done = yield
        session.items = everything
        self._session = session
        self._items = {item.nodeid: item for item in linux}
        folder = self._config.getoption("--nested-log")
        with tempfile.TemporaryDirectory(prefix="nested-") as scratch:
            number = 0
            while self._items:
                log = Path(folder or scratch) / f"machine{number}"
                log.mkdir(parents=True, exist_ok=True)
                self._run_in_a_machine(log)
                number += 1
        return done

    def _nested_wanted(self):
        where = self._config.getoption("--linux-kvm")
        return where == "nested" or (where == "auto" and not kvm.boots_linux())

    def _run_in_a_machine(self, log):
        """Run what was not run yet, until all is done or the machine is down."""
        started = time.monotonic()
        try:
            with NestedMachine(log) as machine:
                self._show(f"nested machine: up after {time.monotonic() - started:.1f} s")
                left = len(self._items)
                done = machine.run(
                    self._command(), left * TEST_S, env=self._environment(), on_output=self._take
                )
                # What has no report by now will have none in another machine either.
                for item in list(self._items.values()):
                    self._fail(item, f"pytest ended with status {done.code}:\n{done.output}")
        except MissingError as error:
            verdict = self._fail if os.environ.get("PYVMM_REQUIRE_KVM") == "1" else self._skip
            for item in list(self._items.values()):
                verdict(item, f"nested machine: {error}")
        except NestedError as error:
            # They run in order: this one was running, or about to.
            self._fail(next(iter(self._items.values())), str(error))

    def _command(self):
        options = "-p no:cacheprovider -p pytest_timeout"
        limits = f"-o timeout={TEST_S} -o faulthandler_timeout={TEST_S - 20}"
        return [sys.executable, "-m", "pytest", *options.split(), *limits.split(), *self._items]

    def _environment(self):
        return os.environ | {
            ROLE: "inside",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYVMM_TEST_DEADLINE": str(DEADLINE_S),
            "PYVMM_REQUIRE_KVM": "1",
        }

    def _take(self, data):
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                self._report(json.loads(text.removeprefix(MARK)))

    def _report(self, data):
        hook = self._config.hook
        report = hook.pytest_report_from_serializable(config=self._config, data=data)
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            self._items.pop(report.nodeid, None)
            if self._session.shouldfail:
                raise self._session.Failed(self._session.shouldfail)

    def _fail(self, item, why):
        self._end(item, "failed", why)

    def _skip(self, item, why):
        self._end(item, "skipped", (str(item.path), item.location[1], f"Skipped: {why}"))

    def _end(self, item, outcome, why):
        """Report a test that did not run."""
        del self._items[item.nodeid]
        keywords = dict.fromkeys(item.keywords, 1)
        report = pytest.TestReport(item.nodeid, item.location, keywords, outcome, why, "call")
        self._config.hook.pytest_runtest_logreport(report=report)

    def _show(self, text):
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.write_line(text)
