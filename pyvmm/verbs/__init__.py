"""The verbs beside ``run``: processes of their own that talk to running VMs by name.

Nothing here is imported by a process that runs a guest, so imports may take their time.
"""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm.errors import ConfigError, PyvmmError

EXIT_FAILURE = 1
EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT


def main(verb: str, arguments: list[str]) -> int:
    """Run ``pyvmm VERB ARGUMENTS``; return the exit code."""
    parser = argparse.ArgumentParser(prog=f"pyvmm {verb}", allow_abbrev=False)
    # argparse has no fixed opinion on "--"; what is behind it is a command to be handed on.
    at = arguments.index("--") if "--" in arguments and verb == "update" else len(arguments)
    arguments, command = arguments[:at], arguments[at + 1 :]
    try:
        if verb == "list":
            from pyvmm.verbs import list as listing

            parser.description = "Show the VMs that run."
            parser.add_argument("--json", action="store_true", help="as a JSON array")
            return listing.show(as_json=parser.parse_args(arguments).json)
        parser.add_argument("name", metavar="NAME", help="the VM's name, as 'pyvmm list' shows it")
        if verb == "monitor":
            from pyvmm.verbs import monitor

            parser.description = "Talk to a VM's human monitor."
            parser.add_argument(
                "command",
                metavar="COMMAND",
                nargs=argparse.REMAINDER,
                help="run this one; exit code 1 if it fails",
            )
            words = parser.parse_args(arguments)
            return monitor.talk(words.name, " ".join(words.command))
        from pyvmm.verbs import update

        parser.usage = "pyvmm update [-h] [--timeout SECONDS] [--trace FILE] NAME [-- COMMAND...]"
        parser.description = (
            "Replace the pyvmm of a running VM by a new one, in place. COMMAND is a whole "
            "'pyvmm run ...', to be found from the VM's working directory; without it the VM's "
            "own command line is used."
        )
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=float,
            default=60.0,
            help="give up, if the guest has not been stopped by then (default 60)",
        )
        parser.add_argument(
            "--trace",
            metavar="FILE",
            help="write there what took how long, for each vCPU too: a picture if FILE ends in "
            ".svg, else Chrome trace events, which ui.perfetto.dev opens",
        )
        words = parser.parse_args(arguments)
        if not 0 < words.timeout < 1e6:
            raise ConfigError(f"--timeout {words.timeout}: give a number of seconds above 0")
        return update.update(words.name, command, words.timeout, words.trace)
    except PyvmmError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
