"""From the start of the VMM to the first line of init: Debian's cloud kernel as it comes (a
bzImage), beside QEMU's microvm, whose RAM is in a memfd too, as an update of it would need. How
fast it is without (its RAM then has huge pages), is told as well.

Measured where Linux boots: on this host's KVM, or in the nested machine, where everything is some
30 times slower and only the ratio means something. This file is also the program that runs there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.machines import BenchError
from bench.report import Result, paired, progress
from bench.spawn import first_output

SCRIPT = "echo init: here\nreboot -f\n"
BOOT_S = 240.0
TESTS = Path(__file__).parents[1]
LIMIT = 1.0
#: What is compared; the first is what the limit is for.
RATIOS = [("pyvmm", "qemu"), ("pyvmm unpacking", "qemu"), ("pyvmm", "qemu, own memory")]

PYVMM = "pyvmm run -m 256M -serial stdio -monitor none".split()
QEMU = [
    *"qemu-system-x86_64 -nodefaults -no-user-config -display none -m 256M -serial stdio".split(),
    *"-machine microvm,accel=kvm,rtc=on -cpu host".split(),
]
MEMFD = [
    *"-object memory-backend-memfd,id=ram,size=256M,share=on".split(),
    *"-machine memory-backend=ram".split(),
]


def bench_boot(plan):
    """Seconds, and how many times as long pyvmm takes."""
    # Imported here: nothing else that is measured needs them.
    from harness import linux
    from nested import kvm, packages
    from nested.machine import NestedMachine
    from nested.port import NestedError

    runs = 2 if plan.quick else plan.runs
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        try:
            options = linux.options(folder, SCRIPT, "reboot=t pci=off")
            command = [sys.executable, "-m", "bench.boot", str(runs), *map(str, options)]
            # Of what is measured nobody looks there.
            own = os.environ | {"PYTHONPATH": str(TESTS)}
            if kvm.boots_linux():
                place = "on this host"
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own)
                code, output = done.returncode, done.stdout
            else:
                place = "in a nested machine"
                progress("boot: starting the nested machine")
                with NestedMachine() as machine:
                    done = machine.run(command, 3 * (runs + 1) * BOOT_S, env=own, on_output=_show)
                code, output = done.code, done.output
        except (packages.MissingError, NestedError) as error:
            raise BenchError(str(error)) from None
    if code:
        raise BenchError(f"boot: the program that measures ended with {code}")
    found = json.loads(output[output.rindex("\n{") :])
    for name, samples in found.items():
        yield Result(f"boot to init: {name}", samples, "s", note=place)
    for name, other in RATIOS if "qemu" in found else ():
        limit = LIMIT if (name, other) == RATIOS[0] else None
        yield paired(f"boot to init: {name}/{other}", found[name], found[other], limit)


def _show(data):
    sys.stderr.buffer.write(data)
    sys.stderr.flush()


# ---- where Linux boots -------------------------------------------------------------------------


def main():
    """Samples of each, in turns; a JSON object of lists behind all else."""
    runs, options = int(sys.argv[1]), sys.argv[2:]
    kinds = {"pyvmm": PYVMM, "pyvmm unpacking": PYVMM}
    if shutil.which(QEMU[0]):
        kinds |= {"qemu": [*QEMU, *MEMFD], "qemu, own memory": QEMU}
    found = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        # The first round brings everything into the page cache, and the kernel into pyvmm's.
        for number in range(runs + 1):
            for name, command in kinds.items():
                cache = f"{folder}/{number}" if name == "pyvmm unpacking" else folder
                own = {"XDG_CACHE_HOME": str(cache)}
                seconds, _ = first_output([*command, *options], b"init: here", BOOT_S, **own)
                progress(f"boot {name} {number}/{runs}: {seconds:.2f} s")
                if number:
                    found[name].append(seconds)
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
