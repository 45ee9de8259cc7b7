"""The command line: verbs, signals, exit codes.

``pyvmm run`` is what a live update executes while the guest waits, so its way to the guest's
first instruction imports no more than it needs; monitors come after that.

Exit codes: 0 the guest or the operator ended it, 1 an error (one line says which), 2 wrong
usage; isa-debug-exit gives (value << 1) | 1.
"""

from __future__ import annotations

import gc
import os
import sys
import time

from pyvmm._util import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import NoReturn

    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.state import CprState
    from pyvmm.machine.machine import Machine
    from pyvmm.rundir import Entry
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

EXIT_FAILURE = 1
EXIT_USAGE = 2

# Set in the environment of a preflight (migration/preflight.py).
PROBE = "PYVMM_CPR_PROBE"

# The signals that end the VMM in order.
ENDING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)

# A vCPU thread that comes back from KVM_RUN waits this long at most for the interpreter.
SWITCH_INTERVAL_S = 0.0005

# How long the one line that says why there is no VM waits for its reader.
LAST_WORDS_S = 2.0

# How often to look whether standard error takes something again, after it did not.
CATCH_UP_S = 1.0

USAGE = """\
usage: pyvmm run [OPTION...]                     run a guest (pyvmm run -help lists the options)
       pyvmm list [--json]                       show the VMs that run
       pyvmm monitor NAME [COMMAND...]           talk to a VM's monitor, or run one command there
       pyvmm update [--timeout S] [--trace FILE] NAME [-- COMMAND...]
                                                 replace a VM's pyvmm by a new one, guest running
       pyvmm state show|diff|check ...           look into state files (pyvmm state -h tells more)
       pyvmm --version                           print the version
       pyvmm --help                              print this

Without options 'pyvmm run' boots the built-in guest, with its serial console and the monitor
on the terminal: Ctrl-a h shows the keys, Ctrl-a c switches between them, Ctrl-a x quits.
"""


def command() -> NoReturn:
    """The installed command: run a verb, and end the process with its exit code."""
    exit_code = main()
    try:
        sys.stdout.flush()
    except OSError:
        exit_code = exit_code or EXIT_FAILURE  # nobody reads it
    # The interpreter would take itself apart, which takes milliseconds; the kernel frees it all.
    os._exit(exit_code)


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return the exit code."""
    open_missing()
    started = time.monotonic_ns()
    # Start-up makes objects that stay; looking for garbage among them is time lost.
    gc.disable()
    arguments = sys.argv[1:] if argv is None else argv
    verb = arguments[0] if arguments else ""
    if verb == "run":
        return run(arguments[1:], started)
    if verb in ("list", "monitor", "update"):
        from pyvmm import verbs

        return verbs.main(verb, arguments[1:])
    if verb == "state":
        from pyvmm import state

        return state.main(arguments[1:])
    if verb in ("--version", "-version", "-V"):
        from pyvmm import __version__

        print(f"pyvmm {__version__}")
        return 0
    if verb in ("--help", "-help", "-h", "help"):
        print(USAGE, end="")
        return 0
    problem = f"{verb}: no such command" if verb else "a command is missing"
    print(f"pyvmm: {problem}\n{USAGE}", end="", file=sys.stderr)
    return EXIT_USAGE


def open_missing() -> None:
    """Have descriptors 0, 1 and 2 open, even if this process was started without: a file that is
    opened later must not get such a number, since it would be read, written and handed on as what
    the number stands for everywhere."""
    while (fd := _open_nothing()) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has found them closed; it is too late for it to notice.
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115


def _open_nothing() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:
        return os.open("/", os.O_RDONLY)  # neither read nor written, but there


def run(argv: list[str], started: int) -> int:
    """``pyvmm run``: build the machine, start or load the guest, serve until its end; return the
    exit code."""
    log.guard_stderr()
    from pyvmm import wayback

    carried: CprState | None = None
    try:
        if PROBE in os.environ:
            # What an update imports only after the exec must be sound, too.
            from pyvmm.machine import builder  # noqa: F401
            from pyvmm.migration import manager, outgoing, preflight  # noqa: F401
            from pyvmm.monitor import attach, front  # noqa: F401

            return preflight.answer(argv)
        if wayback.STATE in os.environ:
            from pyvmm.cpr import state as cpr_state

            carried = cpr_state.inherit(keep=wayback.is_open())
        if carried is None:
            from pyvmm.cpr import probe

            probe.check_environment()
        elif not wayback.is_open():
            from pyvmm.migration import rollback

            rollback.adopt(carried)
        return serve(argv, started, carried)
    except BaseException as error:
        # Until the guest runs any error leads back to the image before: this does not return.
        wayback.attempt(error)
        if carried is not None:
            restore_terminal(carried)
        return end(error)


def end(error: BaseException) -> int:
    """Say what ended the VMM before its time; return the exit code.

    :raises BaseException: the error itself, if it is none that is raised on purpose
    """
    from pyvmm.errors import ConfigError, PyvmmError

    if isinstance(error, KeyboardInterrupt):
        return 128 + _signal.SIGINT
    if not isinstance(error, PyvmmError):
        raise error
    log.say(str(error), LAST_WORDS_S)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE


def restore_terminal(carried: CprState) -> None:
    """Give the terminal back that the image before made raw: nobody else knows of it by now."""
    from pyvmm.cpr.handover import CHARDEV, Handover

    for state in Handover({}, carried.values).inherited_states(CHARDEV).values():
        from pyvmm.chardev.stdio import restore_terminal

        restore_terminal(state)


def serve(argv: list[str], started: int, carried: CprState | None = None) -> int:
    """Build the machine, start or load the guest, and run the main loop; return the exit
    code."""
    from pyvmm import wayback
    from pyvmm._native import name_thread
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.handover import Handover
    from pyvmm.machine import builder, options
    from pyvmm.migration.manager import Migration
    from pyvmm.monitor.front import Front

    try:
        config = options.parse(argv)
    except options.HelpRequested as request:
        if carried is not None:
            raise
        from pyvmm.machine import help

        print(help.describe(*request.args), end="")
        return 0
    if carried is None and config.incoming not in ("", "defer"):
        from pyvmm.migration import open_channel

        open_channel(config.incoming).check()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    handover = Handover(carried.fds, carried.values) if carried else Handover()
    if carried is None:
        # Until the main loop is there to end the VMM in order; in an update they wait, blocked.
        for number in ENDING:
            _signal.signal(number, end_early)
    # Before anything is opened that a running VM of the same name may be using.
    entry = reserve(config.name) if config.name and carried is None else None
    loop = EventLoop()
    machine: Machine | None = None
    front: Front | None = None
    try:
        machine = builder.build(config, loop, handover, loop.stop)
        handle_signals(machine)
        # Whatever started it (python -m, an update): this is how ps shows it.
        name_thread("pyvmm")
        migration = Migration(machine, started)
        machine.start()
        migration.begin()
    except BaseException:
        if machine is not None and not handover.is_incoming:
            machine.close()
        if entry is not None:
            entry.remove()
        raise
    try:
        # The guest runs, perhaps for months: nothing that fails from here on ends it.
        loop.on_error = machine.handle_error
        tell_drops(loop)
        # They come blocked out of an exec, so that they are not lost on a way back.
        machine.attempt(unblock_signals, "signals")
        front = Front(machine, migration, entry)
        machine.attempt(front.open, "start")
        loop.run()
        # Also if this image still waits for its state: who ends it does not want the old one back.
        wayback.close()
        return machine.end.exit_code
    finally:
        # While there is a way back, what is open is the other image's, which goes on with it.
        if not wayback.is_open():
            migration.close()
            if front is not None:
                front.close()
                entry = front.entry
            machine.close()
            log.err.on_drop = None
            log.err.catch_up()
            # Last: from here on another VM may have the name.
            if entry is not None:
                entry.remove()


def end_early(number: int, _frame: object) -> None:
    """End for a signal that comes before the machine is built; undo what there is of it."""
    raise SystemExit(128 + number)


def handle_signals(machine: Machine) -> None:
    """Have SIGINT, SIGTERM and SIGHUP end the VMM in order, and ignore SIGPIPE."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    machine.loop.watch_signals()

    def end(number: int, _frame: object) -> None:
        machine.signalled = number
        machine.loop.call_soon(lambda: machine.quit(128 + number, "host-signal"))

    for number in ENDING:
        _signal.signal(number, end)
    stdio = machine.chardevs.stdio
    if stdio is not None:
        on_cont, on_resize = stdio.handle_cont, stdio.handle_resize
        _handle(machine, _signal.SIGCONT, on_cont)
        _handle(machine, _signal.SIGWINCH, on_resize)


def unblock_signals() -> None:
    """Take the signals that waited until the guest ran."""
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, ENDING)


def tell_drops(loop: EventLoop) -> None:
    """Have the loop say how many messages standard error did not take, once it takes some."""

    def look() -> None:
        if not log.err.catch_up():
            loop.call_later(CATCH_UP_S, look)

    log.err.on_drop = lambda: loop.call_soon(look)


def reserve(name: str) -> Entry:
    """Take the name for this process, or refuse to start; return its entry in the run directory."""
    from pyvmm import rundir

    return rundir.reserve(name)


def _handle(machine: Machine, number: int, handler: Callable[[], None]) -> None:
    _signal.signal(number, lambda _number, _frame: machine.loop.call_soon(handler))
