"""A vCPU's thread: the exit loop, and stopping, resuming and asking it from outside.

The thread leaves KVM_RUN for good only by EINTR: KVM completes a pending port or memory
access before it looks at ``immediate_exit``, so a vCPU that came back with EINTR has no
access half done, whatever it was doing when the kick came, and its state can be read. An
access that is split over a page shows up as further exits on the way; they are served like
any other.

The host may be unable to back memory that the guest touches. Where the processor runs the guest,
KVM_RUN then fails with EFAULT, at the instruction, which the next one repeats. Where KVM's
emulator does, the access comes as one to an address without memory, and a store has left its
instruction behind already: it is kept here and made when the vCPU goes on, before KVM_RUN, as KVM
waits for its end (see ``backing`` for faults that look like something else). What is lost: of
several stores that one emulated instruction makes to such a page (PUSHA, an interrupt in real
mode) all but the last, since KVM tells of no more.
"""

from __future__ import annotations

import _thread
import errno

from pyvmm._native import install_kick, name_thread
from pyvmm.core.threads import START_TIMEOUT_S, Event, Lock, report_crash, spawn
from pyvmm.errors import HostError, InternalError, KvmError, RamError
from pyvmm.kvm import exits

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import TypeVar

    from pyvmm.core.bus import Bus
    from pyvmm.kvm.carrier import Carrier
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.backing import Backing
    from pyvmm.memory.guest import GuestMemory

    T = TypeVar("T")
else:
    import _signal  # what signal wraps in enums, at the cost of importing enum

# Ignored by default: one that is still pending when an exec resets the handlers is harmless.
KICK_SIGNAL = _signal.SIGURG

STOP_TIMEOUT_S = 10.0

_EHWPOISON = 133  # the page has a hardware error; not in every supported Python's errno


class CpuEvents:
    """What a vCPU's thread reports; called on that thread. The machine implements it."""

    def on_shutdown_exit(self, index: int) -> None:
        """The vCPU triple-faulted."""

    def on_system_event(self, index: int, kind: int) -> None:
        """The guest asked for a KVM system event."""

    def on_cpu_error(self, index: int, error: str) -> None:
        """KVM cannot go on with this vCPU."""

    def on_ram_error(self, error: RamError) -> None:
        """The host cannot back memory; the vCPU tries again when it is resumed."""


class Cpu:
    """One vCPU and its thread, which waits until :meth:`resume`.

    :param vcpu: the KVM side
    :param ports: where IN and OUT go
    :param mmio: where accesses to addresses without memory go
    :param events: told about the guest's end
    :param memory: the guest's, to tell why the host cannot back it
    """

    def __init__(
        self,
        vcpu: Vcpu,
        ports: Bus,
        mmio: Bus,
        events: CpuEvents,
        memory: GuestMemory | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.index = vcpu.index
        self.thread_id = 0
        self._ports = ports
        self._mmio = mmio
        self._events = events
        self._memory = memory
        self._backing: Backing | None = None
        # What KVM waits for the end of, and the host has no memory for.
        self._unfinished: exits.Exit | None = None
        self._stop = True
        self._quit = False
        self._recheck = False
        self._work: list[Callable[[], None]] = []
        self._ident = 0
        self._stopped = Event()
        self._go = Event()
        self._entered = Event()
        self._call_lock = Lock()
        # Around what the thread and resume() decide on together.
        self._guard = Lock()

    def start(self) -> None:
        """Start the thread, which goes to its waiting place; does not wait for that. It exists
        until :meth:`close`.

        :raises HostError: the host allows no further thread
        """
        install_kick(KICK_SIGNAL)
        self.vcpu.set_immediate_exit(True)

        def body() -> None:
            name_thread(f"vcpu-{self.index}")
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {KICK_SIGNAL})
            self._ident = _thread.get_ident()
            self.thread_id = _thread.get_native_id()
            self._run()

        spawn(body, self._handle_crash)

    def wait_started(self) -> None:
        """Wait until the thread, which was started and not resumed yet, is at its waiting place.

        :raises HostError: the host has no room for it
        """
        if not self._stopped.wait(START_TIMEOUT_S) or not self._ident:
            raise HostError(f"thread vcpu-{self.index} does not begin; free memory on the host")

    def request_stop(self) -> None:
        """Ask the vCPU to leave the guest; does not wait. Any thread."""
        self._stop = True
        self._kick()

    def wait_stopped(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Wait until the thread is at its waiting place; return False if it does not come. A vCPU
        without a thread is there."""
        return not self._ident or self._stopped.wait(timeout_s)

    def post(self, work: Callable[[], None]) -> bool:
        """Have ``work()`` called on the vCPU's thread, between two KVM_RUNs, as soon as it comes
        by. Does not wait. Any thread.

        :returns: whether there is such a thread
        """
        self._work.append(work)
        self._kick()
        self._go.set()
        return bool(self._ident)

    def resume(self) -> None:
        """Let a stopped vCPU run."""
        with self._guard:
            if self._stopped.is_set():
                self._entered.clear()
            self._stopped.clear()
            self._stop = False
            # Before the thread goes: cleared later it could hide a new request to stop.
            self.vcpu.set_immediate_exit(False)
        self._go.set()

    def wait_entered(self, timeout_s: float) -> None:
        """Wait until a vCPU that was resumed has what it needs of the interpreter to be in the
        guest. The caller, who is the interpreter's busiest user then, would hold it up: for a
        switch interval, and one vCPU after the other."""
        self._entered.wait(timeout_s)

    def call(self, function: Callable[[Vcpu], T]) -> T:
        """Run ``function`` on the vCPU's thread, between two KVM_RUNs, and return its result.

        Works while the guest runs (which it interrupts) and while it is stopped. Not for the
        vCPU's own thread.

        :raises InternalError: the thread does not come; ``function`` may still be run later
        """
        done = Event()
        result: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(function(self.vcpu))
            except BaseException as error:
                failure.append(error)
            done.set()

        with self._call_lock:
            self.post(work)
            if not done.wait(STOP_TIMEOUT_S):
                raise InternalError(f"vCPU {self.index} does not leave KVM_RUN")
        if failure:
            raise failure[0]
        return result[0]

    def recheck_interrupts(self) -> None:
        """Have KVM look whether there is an interrupt for the vCPU, soon; does not wait. Any
        thread; of no use to a stopped vCPU."""
        self._recheck = True
        self._kick()

    def probe(self) -> None:
        """Have the vCPU see whether it waits for the host's memory; does not wait for that. Main
        loop thread."""
        if not self._work and not self._stop:
            self._work.append(lambda: self._look().probe())
            self._kick()

    @property
    def is_unfinished(self) -> bool:
        """Whether the stopped vCPU is in the middle of an access that waits for the host's memory:
        what KVM says of its state is not all of it."""
        return self._unfinished is not None or self.vcpu.brings

    def hand_over(self, carrier: Carrier) -> None:
        """Give a running vCPU to the carrier, as soon as no access is half done; does not wait."""
        carrier.hand_over(self.vcpu)
        self._kick()

    @property
    def stands(self) -> bool:
        """Whether the thread is at its waiting place."""
        return self._stopped.is_set()

    def settle(self) -> None:
        """Do what a vCPU that stands did elsewhere, and no device has seen yet."""
        self.call(self._do_brought)

    def _do_brought(self, vcpu: Vcpu) -> None:
        vcpu.arrive()
        while vcpu.brings:
            self._handle(vcpu.run())

    def abandon(self) -> None:
        """Forget the unfinished access of the stopped vCPU, which is about to be reset."""
        if self._unfinished is not None:
            self.call(self._drop)

    def _drop(self, vcpu: Vcpu) -> None:
        # KVM would go on with it after the reset.
        self._unfinished = None
        vcpu.set_immediate_exit(True)
        try:
            while not isinstance(vcpu.run(), exits.Interrupted):
                pass
        except KvmError:
            pass  # it touched such memory again

    def end(self) -> None:
        """Let the thread end; does not wait. What is waited for is :meth:`wait_stopped`."""
        self._quit = True
        self.request_stop()
        self._go.set()

    def close(self) -> None:
        """End the thread and give the vCPU back, which no thread may kick any more."""
        self.end()
        if self.wait_stopped():
            self.vcpu.close()

    def _kick(self) -> None:
        # The flag first: KVM polls it on the way in, the signal is for a vCPU that is in.
        self.vcpu.set_immediate_exit(True)
        if self._ident and not self._stopped.is_set():
            _signal.pthread_kill(self._ident, KICK_SIGNAL)

    def _run(self) -> None:
        while not self._quit:
            if self._stop:
                self._wait()
            else:
                self._enter()
        self._stopped.set()

    def _wait(self) -> None:
        with self._guard:
            # Resumed since it was asked to stop: it must not be taken for stopped in the guest.
            if not self._stop:
                return
            self._stopped.set()
        self._go.wait()
        self._go.clear()
        self._serve()
        if not self._stop:
            try:
                # It stood still and its clock went on: without this its watchdogs would take
                # the time away for a lockup.
                self.vcpu.kvmclock_ctrl()
            except KvmError:
                pass  # a watchdog's complaint costs the guest less than standing still
        # The interpreter is given up next when KVM_RUN begins.
        self._entered.set()

    def _enter(self) -> None:
        # One KVM_RUN after the other, until a kick ends one with nothing left half done.
        run = self.vcpu.run
        while True:
            exit = self._unfinished
            if exit is None:
                try:
                    exit = run()
                except KvmError as error:
                    self._fail_run(error)
                    return
                if exit is exits.INTERRUPTED:
                    break
            try:
                self._handle(exit)
                self._unfinished = None
            except RamError as error:
                self._unfinished = exit
                self._lack(error)
                return
            except Exception as error:
                self._unfinished = None
                # A bug in a device. The thread lives on, for those who look for the cause.
                report_crash(error)
                self._fail(f"vCPU thread failed: {error!r}")
        self._serve()
        if self._recheck:
            self._recheck = False
            self._look_for_interrupts()
        # After every kick, also one whose reason another kick has led to already: the flag
        # would keep the vCPU out of the guest. Cleared first, then looked at: a request in
        # between sets it again.
        self.vcpu.set_immediate_exit(False)
        if self._stop or self._work or self._recheck or self.vcpu.gate.slot:
            self.vcpu.set_immediate_exit(True)

    def _handle(self, exit: exits.Exit) -> None:
        if isinstance(exit, exits.Io):
            self._handle_io(exit)
        elif isinstance(exit, exits.Mmio):
            self._handle_mmio(exit)
        elif self._explain(exit):
            pass
        elif isinstance(exit, exits.Shutdown):
            self._park()
            self._events.on_shutdown_exit(self.index)
        elif isinstance(exit, exits.SystemEvent):
            self._park()
            self._events.on_system_event(self.index, exit.type)
        else:
            self._fail(str(exit))

    def _look_for_interrupts(self) -> None:
        # What the state is does not matter: that it is set makes KVM look before it enters.
        try:
            self.vcpu.set_mp_state(self.vcpu.get_mp_state())
        except KvmError:
            pass  # a help that the guest mostly does not need; whoever asked asks again

    def _explain(self, exit: exits.Exit | None) -> bool:
        """Return whether KVM_RUN ended with ``exit`` (None: with EFAULT) for want of the host's
        memory, which is then reported, or by our own probe."""
        if self._memory is None:
            return False
        backing = self._look()
        error = backing.explain(exit)
        if error is not None:
            self._lack(error)
            return True
        return exit is not None and backing.retract(exit)

    def _look(self) -> Backing:
        if self._backing is None:
            # An update does without it. Its file has been read since (:func:`import_ahead`).
            from pyvmm.machine.backing import Backing

            assert self._memory is not None
            self._backing = Backing(self.vcpu, self._memory)
        return self._backing

    def _serve(self) -> None:
        while self._work:
            self._work.pop(0)()

    def _handle_io(self, exit: exits.Io) -> None:
        size = exit.size
        for item in (exit.data,) if exit.count == 1 else _items(exit):
            if exit.is_write:
                self._ports.write(exit.port, size, int.from_bytes(item, "little"))
            else:
                item[:] = self._ports.read(exit.port, size).to_bytes(size, "little")

    def _handle_mmio(self, exit: exits.Mmio) -> None:
        if exit.is_write:
            self._mmio.write(exit.gpa, exit.size, int.from_bytes(exit.data, "little"))
        else:
            exit.data[:] = self._mmio.read(exit.gpa, exit.size).to_bytes(exit.size, "little")

    def _park(self) -> None:
        # Stop this vCPU from its own thread: the next KVM_RUN returns without entering.
        self._stop = True
        self.vcpu.set_immediate_exit(True)

    def _fail(self, error: str) -> None:
        self._park()
        self._events.on_cpu_error(self.index, error)

    def _fail_run(self, error: KvmError) -> None:
        if error.errno not in (errno.EFAULT, _EHWPOISON) or not self._explain(None):
            self._fail(str(error))

    def _lack(self, error: RamError) -> None:
        self._park()
        self._events.on_ram_error(error)

    def _handle_crash(self, error: BaseException) -> None:
        # The thread's outermost handler: nothing may wait for it any more.
        report_crash(error)
        self._stop = True
        self._ident = 0
        self._stopped.set()
        self._events.on_cpu_error(self.index, f"vCPU thread failed: {error!r}")


def _items(exit: exits.Io) -> list[memoryview]:
    """Return the bytes of each item of a string instruction."""
    size = exit.size
    return [exit.data[at : at + size] for at in range(0, exit.count * size, size)]


def import_ahead() -> None:
    """Import what is of use only if the host cannot back memory, once the guest runs."""
    from pyvmm.machine import backing  # noqa: F401
