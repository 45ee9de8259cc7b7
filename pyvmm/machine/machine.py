"""The machine: owns the parts, starts and stops them, and decides what a guest's reset,
shutdown or crash leads to.

All methods belong to the main loop thread, but for the ``on_…`` and ``request_…`` ones: those
are called on a vCPU's thread, stop the vCPUs at once, so that no further instruction runs,
and leave the rest to the main loop.
"""

from __future__ import annotations

import time

from pyvmm._native import lib
from pyvmm._util import log
from pyvmm.chardev.factory import ChardevSet
from pyvmm.core import runstate
from pyvmm.core.runstate import RunState
from pyvmm.errors import HostError, InternalError, PyvmmError, RamError, StateError, place
from pyvmm.machine.cpu import STOP_TIMEOUT_S, Cpu, CpuEvents
from pyvmm.vmstate.section import Section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backends.block import BlockFile
    from pyvmm.backends.net.factory import NetdevSet
    from pyvmm.chardev.base import Chardev
    from pyvmm.core.bus import Bus
    from pyvmm.core.eventloop import EventLoop
    from pyvmm.cpr.fdstore import FdStore
    from pyvmm.devices.acpi_pm import AcpiPm
    from pyvmm.devices.base import Device
    from pyvmm.kvm.system import System
    from pyvmm.machine.config import MachineConfig, MonitorConfig
    from pyvmm.machine.kernel import GuestKernel
    from pyvmm.memory.backend import RamBackend
    from pyvmm.memory.guest import GuestMemory
    from pyvmm.x86.irqchip import PicWatch
    from pyvmm.x86.platform import Platform

    Listener = Callable[[str, dict[str, Any] | None], None]

EXIT_FAILURE = 1

# How long the loop stands still for a host that is busy with the guest's requests: when the
# operator stops the guest, who then finds nothing under way or an error, and when the guest
# stops by itself or is reset; and how soon a reset looks again.
STOP_PATIENCE_S = 2.0
RESET_PATIENCE_S = 0.2
RESET_RETRY_S = 0.5
# What each vCPU adds to such a time: its thread has to get the host's processor once.
CPU_PATIENCE_S = 0.05
# How long at most the interpreter is left to the vCPUs that are on their way into the guest.
ENTRY_PATIENCE_S = 0.05

# How soon a device is started again that the host did not let start.
START_RETRY_S = 0.1
# In these the run state is the update's.
_MOVING = (runstate.INMIGRATE, runstate.FINISH_MIGRATE)

# How often a vCPU is asked whether it waits for memory that the host cannot back: two of these.
RAM_INTERVAL_S = 0.5

PANICKED = 1  # bit of the pvpanic port


class Machine(CpuEvents):
    """One machine, put together by ``builder.build``, which fills in all the attributes."""

    system: System
    platform: Platform
    memory: GuestMemory
    ports: Bus
    mmio: Bus
    power: AcpiPm

    def __init__(self, config: MachineConfig, loop: EventLoop, fds: FdStore) -> None:
        self.config = config
        self.loop = loop
        self.fds = fds
        self.runstate = RunState(runstate.INMIGRATE if config.incoming else runstate.PRELAUNCH)
        self.backends: list[RamBackend] = []
        self.drives: dict[str, BlockFile] = {}
        self.devices: list[Device] = []
        # Address, size and GSI of each virtio-mmio device, in the order of their numbers.
        self.virtio_mmio: list[tuple[int, int, int]] = []
        self.chardevs = ChardevSet(loop, fds, self.quit)
        self.netdevs: NetdevSet | None = None
        self.monitors: list[tuple[MonitorConfig, Chardev]] = []
        self._kernel: GuestKernel | None = None
        self.cpus: list[Cpu] = []
        self.pic_watch: PicWatch | None = None
        self.exit_code = 0
        # The number of a signal that is about to end the VMM.
        self.signalled = 0
        # Whether a guest that is still being loaded shall run afterwards.
        self.autostart = not config.start_paused
        self._listeners: list[Listener] = []
        self._requests: list[Callable[[], None]] = []
        # Whether the vCPUs stand until the guest can be reset or ended, and the operator knows.
        self._host_awaited = self._told_of_wait = False

    # ---- what operators and programs ask for ----------------------------------------------

    def cont(self) -> None:
        """Let the guest run. While a state is being loaded: let it run after that.

        :raises StateError: if the guest has to be reset first
        """
        if self.runstate.state == runstate.INMIGRATE:
            self.autostart = True
            return
        if self.runstate.running:
            return
        if self.runstate.needs_reset():
            raise StateError("Resetting the Virtual Machine is required")
        self.resume(runstate.RUNNING)

    def stop(self) -> None:
        """Pause the guest: nothing of it is under way any more.

        :raises PyvmmError: a vCPU or a disk does not get to that; the guest runs on
        """
        if self.runstate.state == runstate.INMIGRATE:
            self.autostart = False
        elif self.runstate.running:
            self.pause_cpus()
            self._set_stopped(runstate.PAUSED)

    def reset(self, reason: str = "host-qmp-system-reset") -> None:
        """Reset the machine; it runs on if it was running, stays paused if it was not. A host
        that still works for the guest as it was is waited for: this returns before.

        :raises InternalError: a vCPU does not leave the guest, which goes on
        :raises Exception: the guest cannot be started anew; that was acted on as an internal error
        """
        error = self._reset(reason)
        if error is not None:
            raise error

    def _reset(self, reason: str) -> Exception | None:
        """Do that; return why the guest cannot be started anew, once it was acted on."""
        if self.runstate.state == runstate.INMIGRATE:
            return None
        running = self.runstate.running
        try:
            if running:
                self._stop_cpus()
            # Of a guest that stopped by itself something may be under way, too.
            self._drain(RESET_PATIENCE_S)
        except HostError as error:
            self._reset_later(reason, error)
            return None
        except Exception:
            if running:
                self.resume_cpus()
            raise
        try:
            self.power_on()
        except Exception as error:
            # Half of the old guest is left: whatever it was in before, it is not to go on.
            self._internal_error(f"reset: {_shown(error)}")
            return error
        if self.runstate.needs_reset():
            self.runstate.set(runstate.PRELAUNCH)
        self.emit("RESET", {"guest": reason.startswith("guest"), "reason": reason})
        if running:
            self.resume_cpus()
        self.kernel.keep({})
        return None

    def _reset_later(self, reason: str, error: HostError) -> None:
        self._await_host("reset", error, lambda: self._reset_alone(reason))

    def _reset_alone(self, reason: str) -> None:
        # Nobody is there to be told by an exception.
        try:
            self._reset(reason)
        except InternalError as error:
            self.warn(str(error))

    def _await_host(self, what: str, error: HostError, function: Callable[[], None]) -> None:
        """Call ``function`` again soon; the guest that was does not go on until then."""
        if not self._told_of_wait:
            self.warn(f"{what}: {error}; it waits for them")
        self._told_of_wait = self._host_awaited = True

        def again() -> None:
            self._host_awaited = False
            function()
            self._told_of_wait = self._host_awaited

        # As a request, which an update does not forget.
        self._requests.append(again)
        self.loop.call_later(RESET_RETRY_S, self.serve_requests)

    def powerdown(self) -> None:
        """Press the power button; the guest may heed it."""
        self.power.handle_power_button()
        self.emit("POWERDOWN", None)

    def quit(self, exit_code: int = 0, reason: str = "host-qmp-quit") -> None:
        """End the VMM; the first call decides the exit code."""
        if not self.loop.stopping:
            self.exit_code = exit_code
            self.emit("SHUTDOWN", {"guest": reason.startswith("guest"), "reason": reason})
            self.loop.stop()

    def subscribe(self, listener: Listener) -> None:
        """Have ``listener(name, data)`` called for each event, with QMP's names."""
        self._listeners.append(listener)

    def emit(self, name: str, data: dict[str, Any] | None) -> None:
        """Tell the listeners of an event."""
        for listener in self._listeners:
            try:
                listener(name, data)
            except Exception as error:
                # A monitor's: what the event is about goes on.
                self.handle_error(error, listener)

    # ---- running and stopping --------------------------------------------------------------

    def start(self) -> None:
        """Start the threads of devices and vCPUs, which wait, and the vCPUs too unless ``-S`` is
        given.

        :raises HostError: the host allows no further thread
        """
        self.prepare_devices()
        # All of them first: they come up beside each other.
        for cpu in self.cpus:
            cpu.start()
        for cpu in self.cpus:
            cpu.wait_started()
        if any(backend.is_limited for backend in self.backends):
            self.loop.call_later(RAM_INTERVAL_S, self._watch_ram)
        if self.runstate.state == runstate.PRELAUNCH:
            if self.autostart:
                self.resume(runstate.RUNNING)
            self.attach_devices()

    def prepare_devices(self) -> None:
        """Have the devices do all that can fail of their start.

        :raises HostError: naming what the host refuses
        """
        for device in self.devices:
            device.prepare()

    def attach_devices(self) -> None:
        """Let the devices take input: their state is complete, booted or loaded. What one of
        them raises comes when all had their turn: after an update the guest goes on all the
        same, and needs the rest of them."""
        failures = []
        for device in self.devices:
            try:
                device.resume()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def halt(self, state: str) -> None:
        """Go to ``state`` since the guest cannot go on, or is not to: whatever its devices are at,
        and also if it stands already. All that stops it but an operator or an update calls this.
        A vCPU that waits for a disk is waited for: this returns before."""
        if self.runstate.running:
            try:
                self._stop_cpus()
            except HostError as error:
                self._await_host(state, error, lambda: self.halt(state))
                return
            except InternalError as error:
                self.resume_cpus()
                self.warn(str(error))
                return
            try:
                self._drain(RESET_PATIENCE_S)
            except Exception as error:
                # What a host that hangs has under way comes to its end some day. A guest that
                # has to stop does not go on for it.
                self.warn(_shown(error))
        elif self.runstate.state in _MOVING or not self.runstate.allows(state):
            return
        self._set_stopped(state)

    def _set_stopped(self, state: str) -> None:
        running = self.runstate.running
        self.runstate.set(state)
        if running:
            self.emit("STOP", None)

    def resume(self, state: str) -> None:
        """Go to ``state`` and let the vCPUs run."""
        self.runstate.set(state)
        self.resume_cpus()
        self.emit("RESUME", None)

    def pause_cpus(self, drain_s: float = STOP_PATIENCE_S) -> None:
        """Get all vCPUs out of the guest, with no access half done, and the devices at rest.

        :param drain_s: how long to wait for what the host has under way
        :raises InternalError: a vCPU does not come (a file that it writes to hangs); all run on
        :raises HostError: a device cannot finish its work; all goes on
        """
        try:
            self._stop_cpus(STOP_PATIENCE_S)
            self._drain(drain_s)
        except HostError as error:
            self.resume_cpus()
            raise HostError(
                f"{error}; the guest runs on: try again when the host is done"
            ) from None
        except Exception:
            self.resume_cpus()
            raise

    def _drain(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        failure: Exception | None = None
        for device in self.devices:
            try:
                device.drain(max(end - time.monotonic(), 0))
            except Exception as error:
                failure = failure or error  # the others have to stand all the same
        if failure is not None:
            raise failure

    def _stop_cpus(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """:raises HostError: a vCPU waits for a disk
        :raises InternalError: one does not come for another reason
        """
        end = time.monotonic() + timeout_s + CPU_PATIENCE_S * len(self.cpus)
        for cpu in self.cpus:
            cpu.request_stop()
        for cpu in self.cpus:
            while not cpu.wait_stopped(min(max(end - time.monotonic(), 0), RESET_PATIENCE_S)):
                for device in self.devices:
                    if device.holds_cpu and (problem := device.busy()):
                        raise HostError(problem)
                if time.monotonic() >= end:
                    raise InternalError(f"vCPU {cpu.index} does not leave KVM_RUN")

    def resume_cpus(self) -> None:
        """Let all vCPUs enter the guest, and the devices work."""
        if self._host_awaited:
            return  # the guest that was is not to go on
        for device in self.devices:
            self._start_device(device)
        for cpu in self.cpus:
            cpu.resume()
        end = time.monotonic() + ENTRY_PATIENCE_S
        for cpu in self.cpus:
            cpu.wait_entered(end - time.monotonic())
        # The guest runs by now: it is no part of a pause.
        if self.pic_watch is not None:
            self.pic_watch.start()

    def _start_device(self, device: Device, told: bool = False) -> None:
        # There may be no way back any more: one that cannot start does not keep the others from it.
        try:
            device.start()
        except Exception as error:
            if not told:
                self.warn(f"{device.name} does not start yet: {error!r}")
            if self.runstate.running:
                self.loop.call_later(START_RETRY_S, lambda: self._start_device(device, True))

    def power_on(self) -> None:
        """Put everything into its state after power-on and the kernel into memory."""
        for cpu in self.cpus:
            cpu.abandon()
        self.platform.reset()
        for device in self.devices:
            device.reset()
        self.prepare_devices()
        self.kernel.load()

    @property
    def kernel(self) -> GuestKernel:
        """What the guest boots; an update has no use for it before its guest runs."""
        if self._kernel is None:
            from pyvmm.machine.kernel import GuestKernel

            self._kernel = GuestKernel(self)
        return self._kernel

    # ---- state -----------------------------------------------------------------------------

    def sections_to_save(self) -> list[Section]:
        """All state, in the order in which it must be read: devices first, since one that
        finishes its work may raise an interrupt, which must be in the irqchip's state; then
        the vCPUs, the chips, and the clock."""
        return [
            *self._device_sections(),
            *self.platform.cpu_sections(),
            *self.platform.chip_sections(),
            self.platform.clock_section(),
        ]

    def sections_to_load(self) -> list[Section]:
        """The same in the order in which it must be loaded: vCPUs with their LAPICs, then the
        chips, which deliver to them, then the devices, which drive the chips; the clock right
        before the guest runs."""
        return [
            *self.platform.cpu_sections(),
            *self.platform.chip_sections(),
            *self._device_sections(),
            self.platform.clock_section(),
        ]

    # ---- what the guest does; called on vCPU threads ---------------------------------------

    def request_reset(self) -> None:
        """The guest pulled the reset line."""
        self._stop_for(lambda: self._guest_reset("guest-reset"))

    def request_power_off(self) -> None:
        """The guest switched itself off."""
        self._stop_for(lambda: self._guest_shutdown("guest-shutdown"))

    def request_exit(self, exit_code: int) -> None:
        """The guest ends the VMM, with a verdict (isa-debug-exit)."""
        self._stop_for(lambda: self.quit(exit_code, "guest-shutdown"))

    def report_panic(self, event: int) -> None:
        """The guest's kernel reports its end on the pvpanic port."""
        if event & PANICKED:
            self._stop_for(self._guest_panic)

    def on_shutdown_exit(self, index: int) -> None:
        self._stop_for(lambda: self._guest_reset("guest-reset"))

    def on_system_event(self, index: int, kind: int) -> None:
        if kind == lib.KVM_SYSTEM_EVENT_RESET:
            self.request_reset()
        elif kind == lib.KVM_SYSTEM_EVENT_CRASH:
            self.report_panic(PANICKED)
        else:
            self.request_power_off()

    def on_thread_error(self, error: str) -> None:
        """An I/O thread has died."""
        self._stop_for(lambda: self._internal_error(error))

    def on_ram_error(self, error: RamError) -> None:
        """The host cannot back memory that the guest needs, directly or in a device; who needs it
        tries again when the guest goes on."""
        self._stop_for(lambda: self._ram_error(error))

    def on_cpu_error(self, index: int, error: str) -> None:
        self._stop_for(lambda: self._internal_error(f"vCPU {index}: {error}"))

    # ---- and what follows from it; main loop -----------------------------------------------

    def handle_error(self, error: Exception, function: Callable[..., None]) -> None:
        """A call of the main loop failed, by a bug. Whose it was makes a new start if it can
        (``recover``); the guest goes on, unless the machine itself is at a loss."""
        owner = getattr(function, "__self__", None)
        text = f"internal error in {place(error)}: {error!r}"
        if owner is self:
            self._internal_error(text)
            return
        self.warn(text)
        recover = getattr(owner, "recover", None)
        if recover is not None:
            try:
                recover()
            except Exception as second:
                self.warn(f"internal error in {place(second)}: {second!r}")

    def _stop_for(self, handler: Callable[[], None]) -> None:
        for cpu in self.cpus:
            cpu.request_stop()
        self._requests.append(handler)
        self.loop.call_soon(self.serve_requests)

    def serve_requests(self) -> None:
        """Act on what the guest asked for.

        The main loop does so by itself. An update does it before it saves: what waits here
        would not survive the exec.
        """
        # One that has to wait puts itself there again.
        for _ in range(len(self._requests)):
            if self._requests and not self.loop.stopping:
                self._requests.pop(0)()

    @property
    def has_requests(self) -> bool:
        """Whether the guest asked for something that was not acted on yet."""
        return bool(self._requests)

    def _guest_reset(self, reason: str) -> None:
        if self.config.actions["reboot"] == "shutdown":
            self._guest_shutdown(reason)
            return
        self._reset_alone(reason)

    def _guest_shutdown(self, reason: str) -> None:
        if self.config.actions["shutdown"] == "pause":
            self.emit("SHUTDOWN", {"guest": True, "reason": reason})
        self._act("shutdown", runstate.SHUTDOWN, reason)

    def _guest_panic(self) -> None:
        action = self.config.actions["panic"]
        shown = {"none": "run", "pause": "pause"}.get(action, "poweroff")
        self.emit("GUEST_PANICKED", {"action": shown})
        self._act("panic", runstate.GUEST_PANICKED, "guest-panic")

    def _internal_error(self, error: str) -> None:
        self.warn(error)
        self._act("internal-error", runstate.INTERNAL_ERROR, "host-error")

    def _act(self, event: str, state: str, reason: str) -> None:
        """Do what ``-action`` says of *event*, which makes an end of the guest: let it go on, end
        the VMM, or leave the guest in *state*."""
        action = self.config.actions[event]
        if action == "none":
            if self.runstate.running:
                self.resume_cpus()
        elif action == "pause":
            self.halt(state)
        else:
            self.quit(EXIT_FAILURE if action == "exit-failure" else 0, reason)

    def _watch_ram(self) -> None:
        self.loop.call_later(RAM_INTERVAL_S, self._watch_ram)
        if self.runstate.running and any(backend.may_lack() for backend in self.backends):
            for cpu in self.cpus:
                cpu.probe()

    def _ram_error(self, error: RamError) -> None:
        if self.runstate.running:
            self.warn(f"{error}, then cont")
            self.halt(runstate.IO_ERROR)

    def attempt(self, step: Callable[[], object], what: str) -> None:
        """Do what the guest shall not end for: a failure is a warning.

        :param what: what is being done, for that
        """
        try:
            step()
        except Exception as error:
            text = str(error) if isinstance(error, PyvmmError) else f"{place(error)}: {error!r}"
            self.warn(f"{what}: {text}")

    def warn(self, text: str) -> None:
        """Tell the operator on standard error. Never raises, never waits. Any thread."""
        log.say(text)

    # ---- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back; the guest is gone. Never raises."""
        for cpu in self.cpus:
            cpu.end()
        # All of them first: one that still runs may be about to stop the others.
        if all(cpu.wait_stopped() for cpu in self.cpus):
            for cpu in self.cpus:
                cpu.close()
        stuck = False
        for device in self.devices:
            try:
                device.close()
            except HostError as error:
                # The host still reads or writes guest memory.
                self.warn(str(error))
                stuck = True
        if self.netdevs is not None:
            self.netdevs.close()
        self.chardevs.close()
        for drive in self.drives.values():
            drive.close()
        if self._kernel is not None:
            self._kernel.close()
        if hasattr(self, "platform"):
            self.platform.close()
        if hasattr(self, "system"):
            self.system.close()
        if not stuck:
            for backend in self.backends:
                backend.close()

    def _device_sections(self) -> list[Section]:
        counts: dict[str, int] = {}
        sections = []
        for device in self.devices:
            if device.vmstate is not None:
                instance = counts.get(device.name, 0)
                counts[device.name] = instance + 1
                sections.append(
                    Section(device.name, instance, device.vmstate, device.save, device.load)
                )
        return sections


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, PyvmmError) else repr(error)
