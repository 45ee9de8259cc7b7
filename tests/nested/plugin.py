"""pytest plugin: runs the tests where Linux boots, those of the folder ``linux``.

If this host's /dev/kvm can run an unmodified Linux, it does nothing. If not, these tests are
collected here, but after all others a pytest of its own runs them in a nested machine, or in two
that share them if the host has the processors; their reports come over as they are made and are
shown, counted and written as if they were this one's. A test whose machine ends meanwhile is run
again in a new one, once: what it does is up to the emulator, too.

The same module is the second pytest's plugin, which prints the reports (``PYVMM_NESTED=inside``).
"""

import json
import os
import queue
import sys
import tempfile
import threading
import time

import pytest
from harness import needs

from nested import kvm, packages
from nested.machine import NestedMachine
from nested.port import NestedError

ROLE = "PYVMM_NESTED"
#: Before each report in the second pytest's output; what else is there, tests printed.
MARK = "\x1enested-report "
#: Seconds that a test may take inside, and that its own deadlines are set to.
TEST_S, DEADLINE_S = 1200, 240
#: So long after a report without another one, the machine must hang, whatever pytest does in there.
SILENCE_S = TEST_S + 60
#: A machine keeps one of the host's processors busy.
MACHINES = min(2, os.cpu_count() or 1)


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
    """The machines have threads, which tell the one of pytest what to do: ``_calls``."""

    def __init__(self, config):
        self._config = config
        self._items = {}
        self._calls = queue.SimpleQueue()

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
        try:
            packages.qemu()
            packages.fetch()
        except packages.MissingError as error:
            for nodeid in list(self._items):
                self._missing(nodeid, f"nested machine: {error}")
            return done
        with tempfile.TemporaryDirectory(prefix="nested-") as scratch:
            self._run(self._config.getoption("--nested-log") or scratch)
        return done

    def _run(self, folder):
        os.makedirs(folder, exist_ok=True)
        shares = [list(self._items)[number::MACHINES] for number in range(MACHINES)]
        shares = [_Share(self, items, folder) for items in shares if items]
        try:
            while self._items:
                method, *arguments = self._calls.get()
                method(*arguments)
        finally:
            for share in shares:
                share.stop()

    def _nested_wanted(self):
        where = self._config.getoption("--linux-kvm")
        return where == "nested" or (where == "auto" and not kvm.boots_linux())

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

    def _missing(self, nodeid, why):
        """There can be no machine for a test."""
        if needs.demanded():
            self._end(nodeid, "failed", why)
        else:
            item = self._items[nodeid]
            self._end(nodeid, "skipped", (str(item.path), item.location[1], f"Skipped: {why}"))

    def _end(self, nodeid, outcome, why):
        """Report a test that did not run to its end."""
        item = self._items.pop(nodeid)
        keywords = dict.fromkeys(item.keywords, 1)
        report = pytest.TestReport(item.nodeid, item.location, keywords, outcome, why, "call")
        self._config.hook.pytest_runtest_logreport(report=report)

    def _show(self, text):
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.write_line(text)

    def _raise(self, error):
        raise error


class _Share:
    """Tests that run one after the other in one machine, and in another if that ends.

    :param outside: has ``_calls``
    :param items: their node ids, in the order in which they are run
    :param folder: where folders with logs go
    """

    def __init__(self, outside, items, folder):
        self._outside, self._items = outside, items
        self._folder = folder
        self._pending = b""
        self._machine = None
        self._silence = None
        self._is_up = self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self):
        """Wait for the end of the machine; make it come if not all was run."""
        if self._items:
            self._stopped = True
            if self._machine is not None:
                self._machine.kill()
        self._thread.join()

    def _tell(self, name, *arguments):
        self._outside._calls.put((getattr(self._outside, name), *arguments))

    def _run(self):
        tried = set()
        try:
            while self._items and not self._stopped:
                self._is_up = False
                try:
                    self._run_in_a_machine(tempfile.mkdtemp(prefix="machine-", dir=self._folder))
                except NestedError as error:
                    if self._stopped:
                        return
                    # They run in order: this one was running, or about to.
                    first = self._items[0]
                    if first not in tried:
                        tried.add(first)
                        self._tell("_show", f"{first}: once more, {error}")
                        continue
                    for _ in range(1 if self._is_up else len(self._items)):
                        self._tell("_end", self._items.pop(0), "failed", str(error))
        except BaseException as error:
            # Whatever it is: the other thread waits for news of these tests.
            self._tell("_raise", error)

    def _run_in_a_machine(self, log):
        """Run what was not run yet, until all is done or the machine is down."""
        started = time.monotonic()
        self._pending = b""
        self._machine = NestedMachine(log)
        with self._machine:
            self._is_up = True
            self._tell("_show", f"nested machine: up after {time.monotonic() - started:.1f} s")
            self._watch()
            try:
                done = self._machine.run(
                    self._command(),
                    len(self._items) * TEST_S,
                    env=self._environment(),
                    on_output=self._take,
                )
            finally:
                self._silence.cancel()
        # What has no report by now will have none in another machine either.
        while self._items:
            why = f"pytest ended with status {done.code}:\n{done.output}"
            self._tell("_end", self._items.pop(0), "failed", why)

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

    def _watch(self):
        """End the machine if it says nothing from now on."""
        if self._silence is not None:
            self._silence.cancel()
        self._silence = threading.Timer(SILENCE_S, self._machine.kill)
        self._silence.daemon = True
        self._silence.start()

    def _take(self, data):
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                report = json.loads(text.removeprefix(MARK))
                self._watch()
                if report["when"] == "teardown":
                    self._items.remove(report["nodeid"])
                self._tell("_report", report)
