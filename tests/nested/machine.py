"""An emulated machine whose kernel has a faithful /dev/kvm, and whose root is the host's.

QEMU emulates a processor with SVM; Debian's kernel runs kvm-amd on it. The host's files are all
there, at the same paths; what is written stays in the machine's memory and goes with it. So the
host's Python, the virtual environment and the checkout run inside as they are (pyvmm as it was when
the machine was started). Python is some 30 times slower there: only ratios that were measured
inside mean anything.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from nested import image, layer, packages
from nested.port import CommandPort, NestedError

#: From start to the first command; 4 s on an idle host.
BOOT_S = 120.0
#: No console output but errors, no calibration, no waiting for what this machine has not got.
KERNEL = (
    "console=ttyS0 panic=-1 tsc=reliable nokaslr mitigations=off audit=0 apparmor=0 "
    "random.trust_cpu=on rcupdate.rcu_expedited=1"
)
PR_SET_PDEATHSIG = 1


class Result:
    """How a command ended.

    :param code: exit status as a shell sees it; 137 also if it was killed at its deadline
    :param output: what it printed, standard error in between
    """

    def __init__(self, code, output):
        self.code = code
        self.output = output

    def __repr__(self):
        return f"Result({self.code}, {self.output!r})"


class NestedMachine:
    """The machine; a context manager. Commands run one after the other.

    :param folder: where ``console.log``, ``qemu.log`` and QEMU's monitor (a socket, ``monitor``)
        go; default: a temporary one
    :param memory: QEMU's ``-m``
    :param cpus: of more than one, each has a thread, and QEMU's emulation of SVM has races then:
        the outer kernel gets the guest's interrupts now and then, and crashes in KVM_RUN
    :param kernel: the package that its kernel is of
    :param modules: further kernel modules
    :param options: further options of QEMU
    :raises packages.MissingError: if the host lacks something
    """

    def __init__(
        self,
        folder=None,
        *,
        memory="4G",
        cpus=1,
        kernel=packages.OUTER_KERNEL,
        modules=(),
        options=(),
    ):
        self._scratch = None
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="nested-")
            folder = self._scratch.name
        self.folder = Path(folder)
        self._memory, self._cpus, self._kernel = memory, cpus, kernel
        self._modules, self._options = modules, options
        self._process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()

    def start(self):
        """Start the machine and wait until it takes commands."""
        qemu = packages.qemu()
        tree = packages.unpacked(self._kernel)
        initrd = self.folder / "initramfs"
        archives = image.initramfs(tree, packages.busybox(), self._modules)
        initrd.write_bytes(archives + image.cpio(layer.files()))
        kernel = packages.vmlinux(self._kernel)
        ours, theirs = socket.socketpair()
        with theirs, open(self.folder / "qemu.log", "wb") as log:
            self._process = subprocess.Popen(
                [*qemu, *self._qemu_options(kernel, initrd, theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                preexec_fn=_die_with_parent(),
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._port = CommandPort(ours, self._pidfd)
        with self._explained():
            self._port.wait_ready(BOOT_S)
        return self

    def kill(self):
        """Have the machine end, whatever another thread does with it."""
        if process := self._process:
            process.kill()

    def close(self):
        """End the machine. Does nothing the second time."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        os.close(self._pidfd)
        self._port.close()
        if self._scratch:
            self._scratch.cleanup()

    def run(self, command, timeout, *, cwd=None, env=None, on_output=None):
        """Run a command as root; what it leaves running is killed.

        :param command: words, or a text for ``sh``
        :param timeout: seconds until it is killed
        :param cwd: folder; default: this process's
        :param env: the whole environment; default: this process's
        :param on_output: is called with bytes as they come
        :raises NestedError: if the machine does not answer; it has ended then
        """
        env = os.environ if env is None else env
        words = [f"{name}={value}" for name, value in env.items()]
        text = command if isinstance(command, str) else shlex.join(map(str, command))
        script = (
            f"cd {shlex.quote(str(cwd or Path.cwd()))} || exit 126\n"
            f"exec env -i {shlex.join(words)} sh -c {shlex.quote(text)}\n"
        )
        output = bytearray()

        def take(data):
            output.extend(data)
            if on_output is not None:
                on_output(data)

        with self._explained():
            code = self._port.run(script, timeout, take)
        return Result(code, output.decode(errors="replace"))

    @property
    def console(self):
        """What the kernel printed."""
        return (self.folder / "console.log").read_text(errors="replace")

    def _qemu_options(self, kernel, initrd, port):
        # What the kernel does not know is in the environment of its first process.
        append = f"{KERNEL} PYTHON={sys.executable}"
        options = [
            *("-M", "pc", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,+svm"),
            *("-smp", str(self._cpus), "-m", self._memory),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", append),
            *("-serial", f"file:{self.folder}/console.log"),
            *("-monitor", f"unix:{self.folder}/monitor,server=on,wait=off"),
            *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
            *("-chardev", f"socket,id=port,fd={port}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"),
        ]
        return [*options, *self._options]

    @contextlib.contextmanager
    def _explained(self):
        """Ends the machine when it has failed, and says what it printed last."""
        try:
            yield
        except NestedError as error:
            log = (self.folder / "qemu.log").read_text(errors="replace")
            tail = "\n".join(self.console.splitlines()[-30:])
            self.close()
            raise NestedError(f"the nested machine {error}\n{log}{tail}") from None
        except BaseException:
            # Whatever runs in there, nobody waits for it any more.
            self.close()
            raise


def _die_with_parent():
    """For the child between fork and exec: it shall not outlive this process."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
