"""``pyvmm`` with a fault in it: ``inject.py [--probe] [MODULE:NAME CODE]... run OPTIONS``.

Each CODE is executed when the function MODULE:NAME is called, before it does its work; with an
empty NAME at once. A ¶ in it is a new line, since a monitor's command is one line. The
preflight's probe goes through unharmed unless --probe is there: then only the probe is hit.
As the update command this is a faulty new image, as the first command of a VM a faulty old one.
"""

import importlib
import os
import sys

from pyvmm import cli


def inject(where, code):
    """Put ``code`` in front of the function ``where``."""
    module_name, _, path = where.partition(":")
    action = compile(code.replace("¶", "\n"), "fault", "exec")
    if not path:
        exec(action, {})
        return
    *outer, name = path.split(".")
    owner = importlib.import_module(module_name)
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def injected(*arguments, **options):
        exec(action, {"arguments": arguments})
        return original(*arguments, **options)

    setattr(owner, name, injected)


start = sys.argv.index("run")
words = sys.argv[1:start]
only_probe = words[:1] == ["--probe"]
if only_probe == (cli.PROBE in os.environ):
    words = words[only_probe:]
    for where, code in zip(words[::2], words[1::2], strict=True):
        inject(where, code)
sys.exit(cli.main(sys.argv[start:]))
