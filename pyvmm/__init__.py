"""pyvmm: a minimal KVM virtual machine monitor with live update built in.

``docs/architecture.md`` in the source tree is the map: start-up, live update, layers, threads,
words. To read on from here, in this order:

* ``machine/builder.py``: what a machine is made of, in the order of the boot
* ``machine/cpu.py``: the exit loop, and how a vCPU is stopped
* ``devices/serial.py``: a device with all that devices have
* ``migration/outgoing.py``, ``migration/incoming.py``: an update, in the old image and the new

No module on the way to the guest's first instruction imports enum, re, typing, dataclasses,
threading and the like: their import time would be part of every update's pause.
"""

import os

if "PYVMM_CPR_WAY_BACK" in os.environ:
    # Before any other module: one that is missing or broken leads back to the image before.
    from pyvmm import wayback

    wayback.arm()

__version__ = "0.1.0"
