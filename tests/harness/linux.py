"""A Linux guest: a Debian kernel, and an initramfs of busybox and a script."""

from pathlib import Path

from nested import image, packages

#: A panic and a reset end the VMM. No PCI and no keyboard to be looked for, which takes long in an
#: emulated machine, as does each character on the serial port.
CMDLINE = "console=ttyS0 quiet panic=-1 reboot=t pci=off tsc=reliable initcall_blacklist=i8042_init"
SETUP = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
"""


def options(folder, script, cmdline="", modules=(), kernel=None):
    """Options of ``pyvmm run`` for a guest whose first program is the script.

    :param folder: where the initramfs is put
    :param modules: names of kernel modules that are loaded first, with all that they need
    :param kernel: default: the vmlinux that the modules belong to
    """
    files = {
        "dev": None,
        "proc": None,
        "bin/busybox": packages.busybox().read_bytes(),
    }
    setup = SETUP
    if modules:
        tree = packages.unpacked(packages.OUTER_KERNEL) / "lib" / "modules"
        for name, data in image.modules(tree, modules).items():
            files[f"modules/{name}.ko"] = data
            setup += f"insmod /modules/{name}.ko\n"
    files["init"] = (setup + script).encode()
    initrd = Path(folder) / "initramfs"
    initrd.write_bytes(image.cpio(files))
    files = ("-kernel", kernel or packages.vmlinux(), "-initrd", initrd)
    return [*files, "-append", f"{CMDLINE} {cmdline}".strip(), "-no-reboot"]
