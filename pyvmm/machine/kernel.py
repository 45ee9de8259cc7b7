"""What the guest boots: firmware's tables and the kernel, at its first start and at each reset.

A new image of an update needs none of this before its guest runs, since memory has it all. So the
loaders are imported when they are used first, or ahead of that, when the guest runs
(:meth:`GuestKernel.keep`). Main loop thread.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.files import BootFiles
    from pyvmm.machine.machine import Machine


class GuestKernel:
    """The kernel of one machine, with its initrd.

    :param machine: whose memory it goes to, and whose hardware the tables describe
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # What a reset loads; none in an updated machine until its guest runs.
        self._files: BootFiles | None = None

    def load(self) -> None:
        """Put the firmware's tables and the kernel into memory.

        :raises ConfigError: a file or the command line cannot be used
        :raises RamError: the host cannot back the memory for it
        """
        from pyvmm.boot import loader
        from pyvmm.boot.files import BootFiles
        from pyvmm.machine import firmware

        machine = self._machine
        files = self._files = self._files or BootFiles(machine.handover)
        rsdp = firmware.write_tables(machine)
        try:
            loader.load(machine.memory, machine.config.kernel, rsdp, files.open)
        except BaseException:
            files.forget_unkept()
            raise

    def keep(self) -> None:
        """See to it that a reset finds what the guest was booted from. Not before the guest runs,
        whose start and whose updates are not delayed for it."""
        from pyvmm.boot.files import BootFiles

        # What a reset needs besides: the package on disk may be another version when one comes.
        from pyvmm.machine import firmware  # noqa: F401

        machine = self._machine
        if self._files is None:
            self._files = BootFiles(machine.handover)
            problems = self._files.take_over(machine.config.kernel)
        else:
            problems = self._files.keep(machine.config.kernel)
        for problem in problems:
            machine.warn(problem)

    def close(self) -> None:
        """Give the files back."""
        if self._files is not None:
            self._files.close()
