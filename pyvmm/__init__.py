"""pyvmm: a minimal KVM virtual machine monitor with live update built in.

Start-up, in the order in which it happens:

0. ``wayback.arm`` opens the way back to the image before, if there was one.
1. ``cli.run`` reads the CPR state that it left (``cpr.state.inherit``).
2. ``machine.options.parse`` turns the command line into a ``MachineConfig``.
3. ``machine.builder.build`` makes the parts: /dev/kvm, memory, VM and vCPUs, chardevs, back
   ends, devices (``machine.drivers``); then the machine, which takes them over, and its kernel.
   What was inherited is taken from ``cpr.handover`` instead of being opened.
4. ``machine.machine.Machine.start`` starts a thread per vCPU; ``machine.cpu.Cpu`` has the
   exit loop.
5. ``migration.incoming.Incoming.begin`` loads a state, if ``-incoming`` says so.
6. ``monitor.attach.open_monitors`` puts the monitors on their chardevs; the guest runs by now.
7. ``core.eventloop.EventLoop.run`` serves until the end.

A live update, in the old image: ``migration.outgoing`` refuses or runs the new command as a
probe (``migration.preflight``); the host's disks come to rest (``migration.quiesce``);
``Outgoing._update`` is the recipe from the running guest to the execve (``migration.cpr_exec``).
In the new image: ``Incoming._load`` from the state to the running guest; ``wayback`` (prepared by
``migration.rollback``) is the way back if that cannot be. ``migration.manager`` is what monitors
see of both.

Layers; imports go down only, which a test enforces:

====  ===========================  ====================================================
rank  packages                     what they know
====  ===========================  ====================================================
0     errors, _util, wayback       nothing of pyvmm
1     _native, vmstate             the cffi boundary; how state is described
2     core, cpr                    event loop, buses, run states; what an exec carries over
3     kvm, memory                  KVM's API, one class a descriptor; guest RAM
4     chardev, backends            byte streams to the host; what is behind disks and networks
5     devices, x86, boot           device models (never KVM), CPU state, kernel loaders
6     machine                      where KVM meets the devices
7     migration                    saving, loading, live update
8     monitor                      HMP and QMP, over one command registry
9     cli and the other verbs      everything
====  ===========================  ====================================================

Threads: the main loop (main thread) owns all but what devices do on guest accesses; a vCPU's
thread enters a device under that device's lock; the terminal's line editor has a thread that
hands its commands to the main loop. No module on the way to the guest's first instruction
imports enum, re, typing, dataclasses, threading and the like: their import time would be part
of every update's pause.

To read on: ``machine/builder.py``, ``machine/cpu.py``, ``devices/serial.py``,
``migration/outgoing.py``. To write a device: ``docs/devices.md``.
"""

import os

if "PYVMM_CPR_WAY_BACK" in os.environ:
    # Before any other module: one that is missing or broken leads back to the image before.
    from pyvmm import wayback

    wayback.arm()

__version__ = "0.1.0"
