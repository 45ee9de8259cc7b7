"""The machine: its guest started, stopped, reset and ended.

What leads to that is elsewhere: the guest's own end in ``guest_end``, an operator's commands in
the monitors, an update in ``migration``. Main loop thread.
"""

from __future__ import annotations

import time

from pyvmm._util import log
from pyvmm.core import runstate
from pyvmm.core.runstate import RunState
from pyvmm.errors import HostError, InternalError, PyvmmError, StateError, place
from pyvmm.machine.cpu import STOP_TIMEOUT_S, Cpu
from pyvmm.machine.parts import report_bug
from pyvmm.vmstate.section import Section, section_names
from pyvmm.x86.irqchip import PicWatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.devices.base import Device
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.kernel import GuestKernel
    from pyvmm.machine.parts import Listener, Parts
    from pyvmm.memory.upkeep import Upkeep

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


class Machine:
    """One machine, whose guest may begin, or have a state loaded into it. A process can have
    several of them on one loop.

    Its parts are seen under their names (:class:`pyvmm.machine.parts.Parts`).

    :ivar cpus: the vCPUs, each with its thread
    :ivar upkeep: takes care of guest RAM beside the guest; None before :meth:`keep_up_ram`
    :ivar autostart: whether a guest that is still being loaded shall run afterwards
    :ivar signalled: the number of a signal that is about to end the VMM, or 0
    """

    def __init__(self, parts: Parts, config: MachineConfig) -> None:
        self.config = config
        self.loop = parts.loop
        self.handover = parts.handover
        self.memory = parts.memory
        self.ram_blocks = parts.ram_blocks
        self.platform = parts.platform
        self.ports = parts.ports
        self.mmio = parts.mmio
        self.pci = parts.pci
        self.chardevs = parts.chardevs
        self.drives = parts.drives
        self.netdevs = parts.netdevs
        self.devices = parts.devices
        self.monitors = list(zip(config.monitors, parts.monitors, strict=True))
        self.end = parts.end
        self.runstate = RunState(runstate.INMIGRATE if config.incoming else runstate.PRELAUNCH)
        self.cpus = [
            Cpu(vcpu, parts.ports, parts.mmio, parts.end, parts.memory)
            for vcpu in parts.platform.vcpus
        ]
        self.upkeep: Upkeep | None = None
        self.autostart = not config.start_paused
        self.signalled = 0
        self._parts = parts
        self._pic_watch = PicWatch(
            parts.loop, self.runstate, parts.platform.vm, self.cpus[0].recheck_interrupts
        )
        self._kernel: GuestKernel | None = None
        # Whether the vCPUs stand until the guest can be reset or ended, and the operator knows.
        self._host_awaited = self._told_of_wait = False
        parts.end.attach(self)
        parts.fw_cfg.ask_files = lambda: self.kernel.keep()

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
        self.set_running()

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
        """Reset, or do so later if the host is busy; return the error, which was acted on, if the
        guest cannot be started anew."""
        if self.runstate.state == runstate.INMIGRATE:
            return None
        running = self.runstate.running
        try:
            if running:
                self._stop_cpus()
            # The host may still work for a guest that stopped by itself, too.
            self.drain(RESET_PATIENCE_S)
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
            self.end.fail(f"reset: {_shown(error)}")
            return error
        if self.runstate.needs_reset():
            self.runstate.set(runstate.PRELAUNCH)
        self.emit("RESET", {"guest": reason.startswith("guest"), "reason": reason})
        if running:
            self.resume_cpus()
        self.kernel.keep()
        return None

    def _reset_later(self, reason: str, error: HostError) -> None:
        self._await_host("reset", error, lambda: self.reset_alone(reason))

    def reset_alone(self, reason: str) -> None:
        """Reset the machine, with nobody there to be told by an exception."""
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

        self.end.postpone(again, RESET_RETRY_S)

    def powerdown(self) -> None:
        """Press the power button; the guest may heed it."""
        self._parts.power.handle_power_button()
        self.emit("POWERDOWN", None)

    def quit(self, exit_code: int = 0, reason: str = "host-qmp-quit") -> None:
        """End the machine, which its owner closes then; the first call decides the exit code."""
        self.end.quit(exit_code, reason)

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        return self.end.ended

    def subscribe(self, listener: Listener) -> None:
        """Have ``listener(name, data)`` called for each event, with QMP's names."""
        self._parts.events.subscribe(listener)

    def emit(self, name: str, data: dict[str, Any] | None) -> None:
        """Tell the listeners of an event."""
        self._parts.events.emit(name, data)

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
        if any(block.is_limited for block in self.ram_blocks):
            self.loop.call_later(RAM_INTERVAL_S, self._watch_ram)
        if self.runstate.state == runstate.PRELAUNCH:
            if self.autostart:
                self.set_running()
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
                device.attach()
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
                self.drain(RESET_PATIENCE_S)
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

    def set_running(self) -> None:
        """Go to the run state ``running``: the vCPUs run on."""
        self.runstate.set(runstate.RUNNING)
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
            self.drain(drain_s)
        except HostError as error:
            self.resume_cpus()
            raise HostError(
                f"{error}; the guest runs on: try again when the host is done"
            ) from None
        except Exception:
            self.resume_cpus()
            raise

    def drain(self, timeout_s: float) -> None:
        """Have the devices come to rest; the vCPUs reach none of them.

        :raises HostError: one cannot finish its work in time
        """
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
        self._start_devices()
        for cpu in self.cpus:
            cpu.resume()
        end = time.monotonic() + ENTRY_PATIENCE_S
        for cpu in self.cpus:
            cpu.wait_entered(end - time.monotonic())
        # The guest runs by now: this is no part of a pause.
        self._pic_watch.start()

    def await_cpus(self) -> None:
        """Go to the run state ``running`` with vCPUs that run elsewhere: their threads wait for
        them in KVM_RUN's place, without the interpreter."""
        self.runstate.set(runstate.RUNNING)
        for cpu in self.cpus:
            cpu.resume()
        end = time.monotonic() + ENTRY_PATIENCE_S + CPU_PATIENCE_S * len(self.cpus)
        for cpu in self.cpus:
            cpu.wait_entered(end - time.monotonic())

    def go_on(self) -> None:
        """The vCPUs of :meth:`await_cpus` run here: so do the devices."""
        self._start_devices()
        self._pic_watch.start()
        self.emit("RESUME", None)

    def _start_devices(self) -> None:
        for device in self.devices:
            self._start_device(device)

    def _start_device(self, device: Device, told: bool = False) -> None:
        # There may be no way back any more: a device that cannot start does not hold up the others.
        try:
            device.start()
        except Exception as error:
            if not told:
                self.warn(f"{device.name} does not start yet: {error!r}")
            if self.runstate.running and not self.ended:
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

    def keep_up_ram(self) -> None:
        """Have guest RAM taken care of from now on, beside the guest."""
        # An update's guest waits for no import that it can do without.
        from pyvmm.memory.upkeep import Upkeep

        self.upkeep = Upkeep(
            self.loop, self.handover, self.ram_blocks, collapses=self.config.ram_collapse
        )

    @property
    def kernel(self) -> GuestKernel:
        """What the guest boots; an update has no use for it before its guest runs."""
        if self._kernel is None:
            from pyvmm.machine.kernel import GuestKernel

            self._kernel = self._parts.opened.add(GuestKernel(self._parts, self.config))
        return self._kernel

    # ---- state -----------------------------------------------------------------------------

    def sections_to_save(self) -> list[Section]:
        """Return all sections in the order in which they are saved.

        Devices come first, since one that finishes its work may raise an interrupt, which must be
        in the irqchip's state; then the vCPUs, the chips, and the clock.
        """
        return [
            *self.device_sections(),
            *self.platform.cpu_sections(),
            *self.platform.chip_sections(),
            self.platform.clock_section(),
        ]

    def sections_to_load(self) -> list[Section]:
        """Return all sections in the order in which they are loaded.

        The vCPUs with their LAPICs come before the chips, which deliver to them, and these before
        the devices, which drive the chips; the clock comes right before the guest runs.
        """
        return [
            *self.platform.cpu_sections(),
            *self.platform.chip_sections(),
            *self.device_sections(),
            self.platform.clock_section(),
        ]

    # ---- the host's faults, and bugs -------------------------------------------------------

    def handle_error(self, error: Exception, function: Callable[..., None]) -> None:
        """A call of the main loop failed, by a bug. In the machine itself that is an internal error
        (``-action``); elsewhere the owner of ``function`` recovers if it can; the guest goes on.
        """
        if getattr(function, "__self__", None) in (self, self.end):
            self.end.fail(f"internal error in {place(error)}: {error!r}")
        else:
            report_bug(error, function)

    def _watch_ram(self) -> None:
        if self.ended:
            return
        self.loop.call_later(RAM_INTERVAL_S, self._watch_ram)
        if self.runstate.running and any(block.may_lack() for block in self.ram_blocks):
            for cpu in self.cpus:
                cpu.probe()

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
        self.end.ended = True
        self._pic_watch.stop()
        for cpu in self.cpus:
            cpu.end()
        # All of them first: one that still runs may be about to stop the others.
        stuck = not all(cpu.wait_stopped() for cpu in self.cpus)
        if self.upkeep is not None and not self.upkeep.close():
            stuck = True
        self._parts.opened.close(stuck=stuck)

    def device_sections(self) -> list[Section]:
        """Return those of the devices: all that is not KVM's."""
        stateful = [device for device in self.devices if device.vmstate is not None]
        names = section_names([(device.place, device.name) for device in stateful])
        return [
            Section(*key, device.vmstate, device.save, device.load, former, _needed(device))
            for device, (key, former) in zip(stateful, names, strict=True)
            if device.vmstate is not None
        ]


def _needed(device: Device) -> Callable[[], bool] | None:
    return (lambda: device.has_state) if device.is_optional else None


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, PyvmmError) else repr(error)
