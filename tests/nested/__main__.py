"""Runs a command in the nested machine, what it prints as it comes: ``python -m nested COMMAND``.

A single word is a command for the shell. Several commands, each one argument of ``-c``, run one
after the other in one machine.
"""

import argparse
import sys

from nested import packages
from nested.machine import NestedMachine


def main():
    parser = argparse.ArgumentParser(prog="python -m nested", description=__doc__)
    parser.add_argument("-c", action="append", default=[], help="a shell command; may be repeated")
    parser.add_argument("-t", "--timeout", type=float, default=600, help="seconds for each")
    help = f"{', '.join(packages.KERNELS)} (default: that of the host's Debian)"
    parser.add_argument("--kernel", choices=packages.KERNELS, metavar="VERSION", help=help)
    help = "emulated processors; with more than one the kernel may crash in KVM_RUN"
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help=help)
    parser.add_argument("--log", metavar="FOLDER", help="keep console.log and qemu.log there")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    commands = arguments.c
    if arguments.command:
        commands.append(arguments.command if arguments.command[1:] else arguments.command[0])
    if not commands:
        parser.error("no command")

    def show(data):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    kernel = packages.KERNELS.get(arguments.kernel, packages.OUTER_KERNEL)
    with NestedMachine(arguments.log, cpus=arguments.cpus, kernel=kernel) as machine:
        for command in commands:
            code = machine.run(command, arguments.timeout, on_output=show).code
    return code


sys.exit(main())
