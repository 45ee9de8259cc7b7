"""What the guest boots: firmware's tables and the kernel, at its first start and at each reset.

A new image of an update needs none of this before its guest runs, since memory has it all. So the
loaders are imported when they are used first, or ahead of that, when the guest runs
(``monitor.front``). Main loop thread.
"""

from __future__ import annotations

from pyvmm._util import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.files import BootFiles
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.parts import Parts


class GuestKernel:
    """The kernel of one machine, with its initrd.

    :param parts: whose memory it goes to, and whose hardware the tables describe
    """

    def __init__(self, parts: Parts, config: MachineConfig) -> None:
        self._parts = parts
        self._config = config
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

        parts = self._parts
        files = self._files = self._files or BootFiles(parts.handover)
        rsdp = firmware.write_tables(parts, self._config)
        try:
            loader.load(parts.memory, self._config.kernel, rsdp, files.open)
        except BaseException:
            files.forget_unkept()
            raise
        parts.fw_cfg.lend(files.descriptors())

    def keep(self) -> None:
        """See to it that a reset finds what the guest was booted from. Not before the guest runs,
        whose start and whose updates are not delayed for it."""
        from pyvmm.boot.files import BootFiles

        if self._files is None:
            self._files = BootFiles(self._parts.handover)
            problems = self._files.take_over(self._config.kernel)
        else:
            problems = self._files.keep(self._config.kernel)
        self._parts.fw_cfg.lend(self._files.descriptors())
        self._files.close_former()
        for problem in problems:
            log.say(problem)
        # For a guest that asks later, perhaps when another version is installed.
        from pyvmm.machine import fw_cfg_items  # noqa: F401

    def close(self) -> None:
        """Give the files back."""
        if self._files is not None:
            self._files.close()
