"""``pyvmm state``: looks into state files, of this build or of another.

``show`` prints one, ``diff`` compares two, ``check`` says whether a machine would take one.
None of it needs KVM or touches a running VM, and a file is only read.

Exit codes: 0 fine, equal or accepted; 1 different or refused; 2 an error, or a file that is
no state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.machine import options
from pyvmm.migration.uri import FileUri
from pyvmm.state import check, diff, show

EXIT_OK = 0
EXIT_DIFFERENT = 1
EXIT_ERROR = 2

_FILE_HELP = "state file, as 'migrate file:FILE' writes it; FILE,offset=N if it begins there"
_EPILOG = """\
examples:
  pyvmm state show vm.state                     all there is, as a tree
  pyvmm state show vm.state 'kvm-vcpu*'         the vCPUs only
  pyvmm state show --json vm.state | jq .ram    for programs
  pyvmm state diff before.state after.state --ignore '*/IA32_TSC' --ignore 'kvmclock*'
  pyvmm state check vm.state -- -m 1G -smp 2    would 'pyvmm run -m 1G -smp 2' take it?

exit codes: 0 fine, equal, accepted; 1 different, refused; 2 error
"""


def main(argv: list[str]) -> int:
    """Run ``pyvmm state ARGV``; return the exit code."""
    at = argv.index("--") if "--" in argv else len(argv)
    words = _parser().parse_args(argv[:at])
    try:
        if argv[at:] and words.verb != "check":
            raise ConfigError(f"pyvmm state {words.verb} takes nothing behind --")
        if words.verb == "show":
            code = _show(words)
        elif words.verb == "diff":
            code = _diff(words)
        else:
            code = _check(words.file, argv[at + 1 :])
        sys.stdout.flush()
        return code
    except PyvmmError as error:
        print(f"pyvmm: {show.printable(str(error))}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyvmm state",
        description="Look into the state files that live updates write.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verb = verbs.add_parser("show", help="print a state as a tree", allow_abbrev=False)
    verb.add_argument("file", metavar="FILE", help=_FILE_HELP)
    verb.add_argument(
        "sections", metavar="SECTION", nargs="*", help="only these, e.g. 'serial[0]' or 'i8*'"
    )
    verb.add_argument("--json", action="store_true", help="as one JSON object, nothing folded")
    verb.add_argument("--all", action="store_true", help="fold no arrays and buffers")
    verb = verbs.add_parser("diff", help="compare two states, value by value", allow_abbrev=False)
    verb.add_argument("a", metavar="A", help=_FILE_HELP)
    verb.add_argument("b", metavar="B", help="the same")
    verb.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave out values whose path fits this shell pattern, e.g. 'kvm-vcpu*/tsc_offset'",
    )
    verb = verbs.add_parser(
        "check",
        help="say whether a machine would take a state",
        usage="pyvmm state check [-h] FILE -- OPTION...",
        description="Say whether this pyvmm, run with these options, would take the state, "
        "and if not, why: all the reasons, one a line. What only KVM can refuse is not seen.",
        allow_abbrev=False,
    )
    verb.add_argument("file", metavar="FILE", help=_FILE_HELP)
    return parser


def _read(name: str) -> bytes:
    return FileUri(name if name.startswith("file:") else f"file:{name}").read()


def _show(words: argparse.Namespace) -> int:
    document = show.document(_read(words.file), words.sections)
    if words.json:
        print(json.dumps(document.as_json(), indent=2))
    else:
        for line in document.lines(fold=not words.all):
            print(line)
    if document.problem:
        sys.stdout.flush()
        problem = show.printable(f"{words.file}: {document.problem}")
        print(f"pyvmm: {problem}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


def _diff(words: argparse.Namespace) -> int:
    found = False
    for line in diff.compare(_read(words.a), _read(words.b), words.ignore):
        found = True
        print(show.printable(line))
    return EXIT_DIFFERENT if found else EXIT_OK


def _check(file: str, arguments: list[str]) -> int:
    data = _read(file)
    try:
        config = options.parse(arguments)
    except options.HelpRequested:
        raise ConfigError("the options ask for help; see pyvmm run -help") from None
    reasons = check.reasons(data, config)
    for reason in reasons:
        print(show.printable(reason))
    if not reasons:
        print(show.printable(f"{file}: this machine would take it"))
    return EXIT_DIFFERENT if reasons else EXIT_OK
