"""``make fuzz``: gives whatever reads what others wrote inputs that no one would write.

    make fuzz                                  all targets, five minutes in all
    make fuzz ARGS="--seconds 3600 virtio qmp"
    make fuzz ARGS="--replay FILE virtio"      what a run found, once, with its traceback
    make fuzz ARGS="--keep"                    afterwards take what was reached into the repository

Targets are functions of bytes (``fuzz.readers``, ``fuzz.devices``). Coverage of the Python code
leads the fuzzer, and the native code of the devices is built with AddressSanitizer and UBSan. What
reached something new stays in build/fuzz and is where the next run begins; tests/fuzz/corpus has
what was kept, which ``make test`` tries as well. The exit code is 1 if something was found.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz import corpus, one, sanitized

BUILD = Path("build/fuzz")
#: Beyond its time: importing, and the last input.
GRACE_S = 120


def main():
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="make fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(one.names()))
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same inputs in each run; default: others each time"
    )
    parser.add_argument("--replay", metavar="FILE", help="try one input, without the fuzzer")
    parser.add_argument("--keep", action="store_true", help="merge into tests/fuzz/corpus")
    options = parser.parse_args()
    targets = options.targets or one.names()
    if unknown := [name for name in targets if name not in one.names()]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(one.names())}")
    if options.seconds < 1:
        parser.error(f"--seconds {options.seconds}: give one at least")
    if options.replay:
        if len(targets) != 1:
            parser.error("--replay FILE takes the target that the file is of")
        try:
            data = Path(options.replay).read_bytes()
        except OSError as error:
            parser.error(f"{options.replay}: {error.strerror}")
        one.find(targets[0])[0](data)
        return 0
    extension = sanitized.build(BUILD)
    jobs = min(len(targets), os.cpu_count() or 1)
    seconds = max(1, options.seconds * jobs // len(targets))
    print(f"{len(targets)} targets, {seconds} s each, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda name: _fuzz(name, seconds, options.seed, extension), targets)
        failed = [name for name, is_good in zip(targets, runs, strict=True) if not is_good]
    if options.keep and not failed:
        for name in targets:
            print(f"{name}: {corpus.keep(name, BUILD, extension)} inputs kept", flush=True)
    return bool(failed)


def _fuzz(name, seconds, seed, extension):
    """Run one target and say how it went; whether nothing was found."""
    folder = corpus.prepare(name, BUILD, one.find(name)[1])
    log = BUILD / f"{name}.log"
    before = {*folder.parent.glob("*-*")}
    started = time.monotonic()
    with open(log, "wb") as output:
        arguments = [f"-max_total_time={seconds}", f"-artifact_prefix={folder.parent}/"]
        command = one.command(name, extension, *arguments, f"-seed={seed}", str(folder))
        environment = os.environ | ({"PYTHONHASHSEED": str(seed)} if seed else {})
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, timeout=seconds + GRACE_S, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = "a hang"
    text = log.read_text(errors="replace")
    took = time.monotonic() - started
    if code == 0:
        print(f"{name}: {one.summary(text)}, {took:.0f} s", flush=True)
        return True
    print(f"{name}: FAILED ({code})\n{one.reason(text)}", flush=True)
    for found in sorted({*folder.parent.glob("*-*")} - before):
        print(f'  again: make fuzz ARGS="--replay {found} {name}"', flush=True)
    print(f"  all of it: {log}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
