"""A Linux guest: a Debian kernel, and an initramfs of busybox and a script."""

import re
import subprocess
import tempfile
from pathlib import Path

from nested import image, packages

#: A bzImage. It has no drivers that are told of their devices on the command line.
CLOUD_KERNEL = packages.CLOUD_KERNEL
#: A vmlinux here, which is entered by PVH.
OTHER_KERNEL = packages.OUTER_KERNEL
#: A panic ends the guest. In an emulated machine a character on the serial port takes half a
#: millisecond: without "quiet" the messages would take longer than all the rest.
CMDLINE = "console=ttyS0 quiet panic=-1"
#: Linux looks for an AGP bridge if the processor is AMD's of family 15, which the emulated one
#: says: 16384 accesses to PCI's ports, 8 s. The cloud kernel does not.
NO_AGP = "pci=off"
SETUP = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
"""
#: Loads the modules of all devices that say what they are, as a distribution does when it starts;
#: then those of the devices that these drivers have found.
COLDPLUG = """
for bus in machine virtio; do
    find /sys/devices -name modalias | xargs sort -u | xargs modprobe -abq
done
"""


def options(folder, script, cmdline="", modules=(), *, kernel=CLOUD_KERNEL, files=None):
    """Options of ``pyvmm run`` for a guest whose first program is the script. It is not rebooted.

    :param folder: where the initramfs is put
    :param modules: names of kernel modules that are loaded first, with all that they need
    :param kernel: the package that it is of
    :param files: what else is in the initramfs, by path; the programs of busybox are in ``bin``
    """
    files = dict.fromkeys(["dev", "proc", "sys", "tmp"]) | (files or {})
    setup = SETUP
    if modules:
        for name, data in image.modules(packages.unpacked(kernel), modules).items():
            files[f"modules/{name}.ko"] = data
            setup += f"insmod /modules/{name}.ko\n"
    files["bin/busybox"] = packages.busybox().read_bytes()
    files["init"] = (setup + script).encode()
    initrd = Path(folder) / "initramfs"
    initrd.write_bytes(image.cpio(files))
    image_file = packages.kernel(kernel) if kernel == CLOUD_KERNEL else packages.vmlinux(kernel)
    append = f"{CMDLINE} {cmdline}".strip()
    return ["-kernel", image_file, "-initrd", initrd, "-append", append, "-no-reboot"]


def module_tree():
    """Files for the initramfs: all of the cloud kernel's modules for ACPI and virtio devices in
    their folders, and depmod's tables, by which modprobe finds them.
    """
    package = packages.unpacked(CLOUD_KERNEL)
    (release,) = package.glob("**/lib/modules/*")
    paths = image.module_paths(release)
    alias = re.compile(rb"\0alias=(acpi|virtio:)")
    wanted = [name for name, path in paths.items() if alias.search(image.read_module(path))]
    files = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in image.modules(release, wanted).items():
            path = Path("lib/modules", release.name, paths[name].relative_to(release))
            path = path.with_name(path.name.removesuffix(".xz"))
            files[str(path)] = data
            Path(scratch, path).parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, path).write_bytes(data)
        subprocess.run([packages.busybox(), "depmod", "-b", scratch, release.name], check=True)
        for table in Path(scratch, "lib", "modules", release.name).glob("modules.*"):
            files[str(table.relative_to(scratch))] = table.read_bytes()
    return files
