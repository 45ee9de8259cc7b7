"""The options of ``pyvmm run``: QEMU's words, read into a :class:`MachineConfig`.

One table says what each option takes and does; ``--help`` prints it. argparse is not used:
its import would be part of each update's pause, and QEMU's options have one dash and values
that begin with one. Nothing is opened here, so a command line can be judged beforehand.
"""

from __future__ import annotations

from pyvmm._util.keyval import (
    check_keys,
    did_you_mean,
    parse_bool,
    parse_int,
    parse_keyval,
    shorten,
)
from pyvmm._util.sizes import parse_size
from pyvmm.boot import builtin
from pyvmm.boot.config import TYPES, UNPACKERS, KernelConfig
from pyvmm.chardev.config import (
    ChardevConfig,
    check_chardevs,
    parse_chardev,
    parse_chardev_short,
)
from pyvmm.errors import ConfigError
from pyvmm.machine.config import (
    ACTIONS,
    MACHINE_TYPE,
    MAX_SERIALS,
    MachineConfig,
    MonitorConfig,
)
from pyvmm.memory.config import RamConfig
from pyvmm.x86 import layout
from pyvmm.x86.cpuid import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backends.block_config import BlockOptions

MAX_CPUS = 255

MACHINE_PROPERTIES = (
    "type", "accel", "acpi", "memory-backend", "anon-alloc", "aux-ram-share", "kernel-unpack",
    "kernel-type", "ram-collapse", "pci",
)  # fmt: skip


class HelpRequested(Exception):
    """``-help`` was among the options; the arguments are the option whose values are asked
    for and of which kind, or empty."""


class Options:
    """Reads one command line.

    :param argv: the arguments behind ``pyvmm run``
    """

    def __init__(self, argv: list[str]) -> None:
        self.config = MachineConfig()
        self.config.argv = list(argv)
        self._kernel = self._initrd = ""
        self._append: str | None = None
        self._unpack, self._type = UNPACKERS[0], TYPES[0]
        self._given: set[str] = set()
        self._block: BlockOptions | None = None

    def parse(self) -> MachineConfig:
        """Read and check all options; return the machine that they ask for.

        :raises ConfigError: naming the option, the value and the mend
        :raises HelpRequested: if help is asked for
        """
        words = iter(self.config.argv)
        for word in words:
            name = word.removeprefix("-").removeprefix("-")
            if not word.startswith("-") or name not in OPTIONS:
                raise ConfigError(_unknown(word))
            argument, _, handler = OPTIONS[name]
            if not argument:
                self._given.add(name)
                handler(self, "", f"-{name}")
                continue
            value = next(words, None)
            if value is None:
                raise ConfigError(f"-{name}: a value is missing; write -{name} {argument}")
            kind, _, last = value.rpartition(",")
            if last in ("help", "?") and name not in PLAIN:
                raise HelpRequested(name, kind.partition(",")[0].removeprefix("driver="))
            if name not in REPEATABLE and name in self._given:
                raise ConfigError(f"-{name}: given twice; leave one of them out")
            self._given.add(name)
            handler(self, value, f"-{name}")
        self._complete()
        return self.config

    # ---- one method per option -------------------------------------------------------------

    def _memory(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="size")
        check_keys(keys, ("size",), option)
        self.config.memory_size = parse_size(
            keys["size"],
            option,
            default_unit="M",
            minimum=layout.MIN_RAM,
            maximum=layout.MAX_RAM,
            multiple=layout.PAGE,
        )

    def _smp(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="cpus")
        check_keys(keys, ("cpus", "maxcpus", "sockets", "cores", "threads"), option)
        counts = {key: parse_int(keys[key], option, key, 1, MAX_CPUS) for key in keys}
        sockets, threads = counts.get("sockets", 1), counts.get("threads", 1)
        cpus = counts.get("cpus", 0)
        # As in QEMU: what is not said is cores, and if these are, sockets.
        cores = counts.get("cores") or max(cpus // (sockets * threads), 1)
        if "sockets" not in counts:
            sockets = max(cpus // (cores * threads), 1)
        product = sockets * cores * threads
        if product != (cpus or product) or product > MAX_CPUS:
            raise ConfigError(
                f"{option}: sockets x cores x threads is {product}, not cpus={cpus or MAX_CPUS}"
            )
        if counts.get("maxcpus", product) != product:
            raise ConfigError(
                f"{option}: maxcpus must equal cpus ({product}): CPUs are not hotplugged"
            )
        try:
            self.config.topology = Topology(sockets, cores, threads)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}; choose one") from None

    def _object(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="qom-type")
        kind = keys.pop("qom-type", "")
        if kind.startswith("rng-"):
            from pyvmm.backends import rng

            if kind not in rng.KINDS:
                known = ", ".join(rng.KINDS)
                raise ConfigError(f"{option}: {shorten(kind)} is no source; give one of {known}")
            self.config.rngs.append(rng.RngConfig(kind, keys))
            return
        self.config.objects.append(RamConfig.from_options(kind, keys))

    def _machine(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="type")
        check_keys(keys, MACHINE_PROPERTIES, option)
        kind = keys.get("type", MACHINE_TYPE)
        if kind != MACHINE_TYPE:
            raise ConfigError(f"{option}: {shorten(kind)} is no machine; the one is {MACHINE_TYPE}")
        if keys.get("accel", "kvm") != "kvm":
            raise ConfigError(f"{option}: accel={shorten(keys['accel'])}: the one is kvm")
        self.config.memory_backend = keys.get("memory-backend", self.config.memory_backend)
        # The present name of anon-alloc=memfd. Off is QEMU's default, which loses such memory
        # in an update; here memory comes from memfds unless anon-alloc=mmap is asked for.
        if "aux-ram-share" in keys:
            parse_bool(keys["aux-ram-share"], option, "aux-ram-share")
        alloc = keys.get("anon-alloc", self.config.anon_alloc)
        if alloc not in ("memfd", "mmap"):
            raise ConfigError(f"{option}: anon-alloc={shorten(alloc)}: give memfd or mmap")
        self.config.anon_alloc = alloc
        unpack = keys.get("kernel-unpack", self._unpack)
        if unpack not in UNPACKERS:
            raise ConfigError(f"{option}: kernel-unpack={shorten(unpack)}: give host or guest")
        self._unpack = unpack
        self._type = keys.get("kernel-type", self._type)
        if self._type not in TYPES:
            mend = did_you_mean(self._type, TYPES) or f"give one of {', '.join(TYPES)}"
            raise ConfigError(f"{option}: kernel-type={shorten(self._type)}: {mend}")
        self.config.acpi = parse_bool(keys.get("acpi", "on"), option, "acpi")
        if "pci" in keys:
            self.config.pci = parse_bool(keys["pci"], option, "pci")
        collapse = keys.get("ram-collapse", "on")
        self.config.ram_collapse = parse_bool(collapse, option, "ram-collapse")

    def _accel(self, value: str, option: str) -> None:
        if value != "kvm":
            raise ConfigError(f"{option}: {shorten(value)} is no accelerator; the one is kvm")

    def _cpu(self, value: str, option: str) -> None:
        if value not in ("host", "max"):
            from pyvmm.x86 import cpu_features

            self.config.cpu_changes = cpu_features.parse(value, option)

    def _set_kernel(self, value: str, option: str) -> None:
        self._kernel = value

    def _set_initrd(self, value: str, option: str) -> None:
        self._initrd = value

    def _set_append(self, value: str, option: str) -> None:
        self._append = value

    def _bios(self, value: str, option: str) -> None:
        self.config.bios = value

    def _chardev(self, value: str, option: str) -> None:
        self.config.chardevs.append(parse_chardev(value, option))

    def _netdev(self, value: str, option: str) -> None:
        from pyvmm.backends.net.config import parse_netdev

        self.config.netdevs.append(parse_netdev(value, option))

    def _serial(self, value: str, option: str) -> None:
        number = len(self.config.serials)
        if number == MAX_SERIALS:
            raise ConfigError(f"{option}: {shorten(value)} is one too many; at most {MAX_SERIALS}")
        chardev = parse_chardev_short(value, option, f"serial{number}")
        self.config.serials.append(chardev)
        if chardev is not None and value.startswith("mon:"):
            shared = ChardevConfig("chardev", chardev.id, {}, option)
            self.config.monitors.append(MonitorConfig(shared, "readline"))

    def _monitor(self, value: str, option: str) -> None:
        mode = "control" if option.startswith("-qmp") else "readline"
        self._given.add("monitor")
        chardev = parse_chardev_short(value, option, f"compat_monitor{len(self.config.monitors)}")
        if chardev is not None:
            pretty = option == "-qmp-pretty"
            self.config.monitors.append(MonitorConfig(chardev, mode, pretty))

    def _mon(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="chardev")
        check_keys(keys, ("chardev", "mode", "pretty", "id"), option)
        mode = keys.get("mode", "readline")
        if mode not in ("readline", "control"):
            raise ConfigError(f"{option}: mode={shorten(mode)}: give readline or control")
        if "chardev" not in keys:
            raise ConfigError(f"{option}: chardev= is missing; give the id of a -chardev")
        pretty = parse_bool(keys.get("pretty", "off"), option, "pretty")
        chardev = ChardevConfig("chardev", keys["chardev"], {}, option)
        self.config.monitors.append(MonitorConfig(chardev, mode, pretty))
        self._given.add("monitor")

    def _debugcon(self, value: str, option: str) -> None:
        chardev = parse_chardev_short(value, option, "debugcon")
        if chardev is not None:
            if chardev.kind != "chardev":
                self.config.chardevs.append(chardev)
            from pyvmm.machine import drivers

            device = drivers.parse("isa-debugcon", {"chardev": chardev.id}, option)
            self.config.devices.append(device)

    def _device(self, value: str, option: str) -> None:
        # A machine without devices does not pay for what is known of them.
        from pyvmm.machine import drivers

        keys = parse_keyval(value, option, implied_key="driver")
        device = drivers.parse(keys.pop("driver", ""), keys, option)
        others = [one for one in self.config.devices if one.driver is device.driver]
        if others and device.driver.is_single:
            where = f"{option} {device.driver.name}"
            raise ConfigError(f"{where}: there is one already; leave one of them out")
        self.config.devices.append(device)

    def _drive(self, value: str, option: str) -> None:
        self._block_options().add_drive(value, option)

    def _blockdev(self, value: str, option: str) -> None:
        self._block_options().add_blockdev(value, option)

    def _block_options(self) -> BlockOptions:
        # A machine without disks does not pay for their options.
        from pyvmm.backends.block_config import BlockOptions

        self._block = self._block or BlockOptions()
        return self._block

    def _fw_cfg(self, value: str, option: str) -> None:
        from pyvmm.machine import fw_cfg_files

        self.config.fw_cfg.append(fw_cfg_files.parse(value, option, self.config.fw_cfg))

    def _global(self, value: str, option: str) -> None:
        name, _, setting = value.partition("=")
        if "," in value or name == "driver":
            keys = parse_keyval(value, option)
            check_keys(keys, ("driver", "property", "value"), option)
            name = f"{keys.get('driver', '')}.{keys.get('property', '')}"
            setting = keys.get("value", "")
        if name != "kvm-pit.lost_tick_policy":
            raise ConfigError(
                f"{option}: {shorten(name)} cannot be set; what can is kvm-pit.lost_tick_policy"
            )
        if setting not in ("delay", "discard"):
            raise ConfigError(f"{option}: {name}={shorten(setting)}: give delay or discard")
        self.config.pit_reinjects = setting == "delay"

    def _name(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option, implied_key="guest")
        check_keys(keys, ("guest", "process", "debug-threads"), option)
        self.config.name = keys.get("guest", "")

    def _incoming(self, value: str, option: str) -> None:
        if value != "defer" and not value.startswith(("file:", "memfd:")):
            raise ConfigError(f"{option}: {shorten(value)}: give file:PATH or defer")
        self.config.incoming = value

    def _paused(self, value: str, option: str) -> None:
        self.config.start_paused = True

    def _only_migratable(self, value: str, option: str) -> None:
        self.config.only_migratable = True

    def _no_reboot(self, value: str, option: str) -> None:
        self.config.actions["reboot"] = "shutdown"

    def _no_shutdown(self, value: str, option: str) -> None:
        self.config.actions["shutdown"] = "pause"

    def _action(self, value: str, option: str) -> None:
        keys = parse_keyval(value, option)
        check_keys(keys, ACTIONS, option)
        for event, action in keys.items():
            if action not in ACTIONS[event]:
                known = ", ".join(ACTIONS[event])
                raise ConfigError(f"{option}: {event}={shorten(action)}: give one of {known}")
            self.config.actions[event] = action

    def _display(self, value: str, option: str) -> None:
        if value != "none":
            raise ConfigError(f"{option}: {shorten(value)}: there is no display; give none")

    def _nothing(self, value: str, option: str) -> None:
        """Accepted because QEMU's command lines have it; it is so anyway."""

    def _help(self, value: str, option: str) -> None:
        raise HelpRequested("", "")

    # ---- what the options mean together ----------------------------------------------------

    def _complete(self) -> None:
        config = self.config
        explicit = "serial" in self._given or "monitor" in self._given
        if not explicit and "nodefaults" not in self._given:
            self._serial("mon:stdio", "-serial")
        # A port that nobody asked for is there all the same: guests print on it.
        if not config.serials:
            config.serials.append(None)
        kernel = self._kernel
        if not kernel and self._type != TYPES[0]:
            raise ConfigError(
                f"-machine: kernel-type={self._type} is about a kernel; add -kernel FILE"
            )
        if not kernel and (not config.bios or self._append is not None):
            # An update's guest has it, and what a reset loads is kept.
            kernel = builtin.path(builtin.GUEST, required=not config.incoming)
            # Saves it from waiting for CPUs that do not exist.
            self._append = f"{self._append or ''} pyvmm.cpus={config.smp}".lstrip()
        config.kernel = KernelConfig(
            kernel, self._initrd, self._append or "", self._unpack, self._type
        )
        self._check_memory()
        self._complete_block()
        requests = [*config.chardevs, *(chardev for chardev in config.serials if chardev)]
        requests += [monitor.chardev for monitor in config.monitors]
        requests += [ChardevConfig("chardev", id, {}, "-device") for id in self._named("chardev")]
        check_chardevs(requests)
        networks, sources = self._named("netdev"), self._named("rng")
        if config.netdevs or networks:
            from pyvmm.backends.net.config import check_netdevs

            check_netdevs(config.netdevs, networks)
        if config.rngs or sources:
            from pyvmm.backends.rng import check_rngs

            check_rngs(config.rngs, [block.id for block in config.objects], sources)
        if config.devices:
            from pyvmm.machine import drivers

            drivers.settle(config.devices)
            on_pci = [one.driver.name for one in config.devices if one.driver.bus == "pci"]
            if config.pci is False and on_pci:
                raise ConfigError(
                    f"-device {on_pci[0]}: -machine pci=off says that there is no bus; give pci=on"
                )

    def _named(self, kind: str) -> list[str]:
        """Return the ids of the back ends of that kind that devices use."""
        return [id for device in self.config.devices for id in device.refers(kind)]

    def _complete_block(self) -> None:
        config = self.config
        if self._block is None and not self._named("drive"):
            return
        from pyvmm.backends.block_config import check_block

        block = self._block_options()
        config.drives = block.complete()
        for id in block.implied:
            self._device(f"virtio-blk-device,drive={id}", "-drive")
        check_block(
            config.drives,
            [
                (id, device.values["share-rw"])
                for device in config.devices
                for id in device.refers("drive")
            ],
        )

    def _check_memory(self) -> None:
        config = self.config
        sizes = {}
        for backend in config.objects:
            if backend.id in sizes:
                raise ConfigError(f"-object: the id {backend.id} is given twice; rename one")
            sizes[backend.id] = backend.size
        # The one object of the size of main memory is main memory.
        if not config.memory_backend and len(sizes) == 1:
            (config.memory_backend,) = sizes
        if not config.memory_backend:
            return
        if config.memory_backend not in sizes:
            raise ConfigError(
                f"-machine: memory-backend={shorten(config.memory_backend)}: there is no such "
                "-object; add one with that id"
            )
        size = sizes[config.memory_backend]
        if "m" not in self._given:
            config.memory_size = size
        if size != config.memory_size:
            raise ConfigError(
                f"-m: {config.memory_size} bytes, but -object {config.memory_backend} has {size}; "
                "make them equal"
            )


#: Options that may be given more than once.
REPEATABLE = {"object", "netdev", "chardev", "serial", "monitor", "qmp", "qmp-pretty", "mon"} | {
    "device",
    "action",
    "drive",
    "blockdev",
    "debugcon",
    "fw_cfg",
    "global",
    "name",
}

#: Options whose value may be any text.
PLAIN = {"append", "kernel", "initrd", "bios", "name"}

#: name: (what its value looks like, help, handler)
OPTIONS: dict[str, tuple[str, str, Callable[[Options, str, str], None]]] = {
    "m": ("SIZE", "guest memory, e.g. 512M or 4G (default 128M)", Options._memory),
    "smp": ("N[,sockets=N][,cores=N][,threads=N]", "number of vCPUs (default 1)", Options._smp),
    "kernel": ("FILE", "Linux bzImage or vmlinux, PVH or multiboot kernel, or flat image\n"
               "(default: built in)",
               Options._set_kernel),
    "initrd": ("FILE", "initial RAM disk, given to the kernel as its first module",
               Options._set_initrd),
    "append": ("TEXT", "kernel command line", Options._set_append),
    "bios": ("FILE", "ROM that the CPUs start in (default: built in)", Options._bios),
    "object": ("memory-backend-memfd|file|ram,id=ID,size=SIZE[,share=on|off][,prealloc=on]"
               "[,mem-path=PATH][,hugetlb=on][,hugetlbsize=SIZE]",
               "memory that -machine memory-backend=ID makes the guest's; the only one is it;\n"
               "or rng-random,id=ID[,filename=PATH], for -device virtio-rng-device,rng=ID",
               Options._object),
    "machine": ("[pyvmm][,acpi|pci|ram-collapse=on|off][,memory-backend=ID]"
                "[,anon-alloc=memfd|mmap][,aux-ram-share=on][,kernel-unpack=host|guest]"
                f"[,kernel-type={'|'.join(TYPES)}]",
                "machine type and its properties; without ACPI there is still an MP table;\n"
                "kernel-unpack says who unpacks a bzImage: the host, which is faster and caches\n"
                "it, or the kernel itself, with KASLR; kernel-type says of what kind -kernel is\n"
                "if it does not show that: flat for a real-mode image that is no boot sector;\n"
                "ram-collapse says whether memory that the guest has touched becomes huge pages;\n"
                "pci says whether there is a PCI bus: if not given, with a device that sits on it",
                Options._machine),
    "accel": ("kvm", "the accelerator; there is one", Options._accel),
    "cpu": ("host|max[,+FEATURE][,-FEATURE][,FEATURE=on|off...]",
            "the CPU that the guest sees: this host's; features are named as in QEMU",
            Options._cpu),
    "chardev": ("stdio|pty|socket|file|null|ringbuf,id=ID[,mux=on][,KEY=VALUE...]",
                "byte stream to the host, for the options below as chardev:ID",
                Options._chardev),
    "netdev": ("tap|stream|passt,id=ID[,KEY=VALUE...]",
               "network, for -device virtio-net-device,netdev=ID: tap,ifname=NAME|fd=N;\n"
               "stream,addr.type=unix,addr.path=PATH|addr.type=inet,addr.host=HOST,addr.port=N,\n"
               "server=on|off; passt[,tcp-ports=2222:22], which needs no privileges",
               Options._netdev),
    "serial": ("DEV", "serial port on DEV: stdio, mon:stdio (with the monitor), pty, null, none,\n"
               "file:PATH, unix:PATH,server=on,wait=off, tcp:HOST:PORT,..., chardev:ID",
               Options._serial),
    "monitor": ("DEV", "human monitor on DEV", Options._monitor),
    "qmp": ("DEV", "QMP monitor, for programs, on DEV", Options._monitor),
    "qmp-pretty": ("DEV", "the same with indented output", Options._monitor),
    "mon": ("[chardev=]ID[,mode=readline|control]", "monitor on a -chardev", Options._mon),
    "debugcon": ("DEV", "debug console (port 0xe9) on DEV", Options._debugcon),
    "device": ("DRIVER[,KEY=VALUE...]", "add a device", Options._device),
    "drive": ("file=PATH,format=raw[,if=virtio|none][,id=ID][,readonly=on]"
              "[,cache=none|writeback|...][,discard=unmap][,werror=enospc|report|ignore|stop]"
              "[,rerror=report|ignore|stop]",
              "disk image; if=none: for a -device virtio-blk-device,drive=ID\n"
              "what follows an error of the host: the guest is told, or pauses until cont\n"
              "(enospc: if there is no space)", Options._drive),
    "blockdev": ("driver=raw|file|host_device,node-name=ID[,filename=PATH|,file=ID][,...]",
                 "the same as nodes, with dotted keys or as JSON", Options._blockdev),
    "fw_cfg": ("[name=]NAME,file=PATH|string=TEXT",
               "item for firmware and kernels made for QEMU; names of users begin with opt/",
               Options._fw_cfg),
    "global": ("kvm-pit.lost_tick_policy=delay|discard",
               "whether ticks of the PIT that the guest has missed come later (default) or never",
               Options._global),
    "name": ("NAME", "name of the guest, for lists and monitors", Options._name),
    "incoming": ("file:PATH[,offset=N]|defer", "load a state instead of booting",
                 Options._incoming),
    "only-migratable": ("", "refuse whatever would keep the guest from being updated",
                        Options._only_migratable),
    "S": ("", "do not start the guest; the monitor's cont does", Options._paused),
    "no-reboot": ("", "end instead of resetting", Options._no_reboot),
    "no-shutdown": ("", "pause instead of ending when the guest shuts down",
                    Options._no_shutdown),
    "action": ("EVENT=ACTION[,...]",
               "; ".join(f"{event}={'|'.join(values)}" for event, values in ACTIONS.items()),
               Options._action),
    "nographic": ("", "accepted; it is so anyway", Options._nothing),
    "nodefaults": ("", "no serial console and monitor that nobody asked for", Options._nothing),
    "enable-kvm": ("", "accepted; it is so anyway", Options._nothing),
    "display": ("none", "accepted; there is no display", Options._display),
    "vga": ("none", "accepted; there is no display", Options._display),
    "help": ("", "print this", Options._help),
    "h": ("", "print this", Options._help),
}  # fmt: skip
OPTIONS["M"] = OPTIONS["machine"]


def parse(argv: list[str]) -> MachineConfig:
    """Return the machine that ``pyvmm run ARGV`` asks for.

    :raises ConfigError: naming the option, the value and the mend
    :raises HelpRequested: if help is asked for
    """
    return Options(argv).parse()


def _unknown(word: str) -> str:
    if not word.startswith("-"):
        return f"{shorten(word)}: not an option; a kernel is given with -kernel FILE"
    close = did_you_mean(word.lstrip("-"), OPTIONS).replace("mean ", "mean -")
    mend = close or "see pyvmm run -help"
    return f"{shorten(word)}: unknown option; {mend}"
