"""An interrupt that something swallows is raised again at the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWALLOWED = """
import os, signal, sys
from wsi_rt.runtime import interrupts
from wsi_rt.runtime.progress import Progress

signal.signal(signal.{name}, signal.SIG_DFL)  # ignored where the tests run in the background
interrupts.install()
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):  # the handler runs between two of these
        pass
    print("not raised")
except:
    print("swallowed")
os.kill(os.getpid(), signal.{name})  # a second one interrupts no clean-up
try:
    with Progress() as progress:
        progress.update("work", 0, 1)
    print("went on")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_swallowed_interrupt_stops_the_next_step(name):
    done = subprocess.run([sys.executable, "-c", SWALLOWED.format(name=name)], capture_output=True, text=True)
    assert done.stdout.split() == ["swallowed", "stopped"], done.stderr


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    code = (
        "import os, signal; from wsi_rt.runtime import interrupts; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "interrupts.install(); os.kill(os.getpid(), signal.SIGHUP); interrupts.checkpoint(); print('alive')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "alive\n"


def test_nothing_asked_nothing_raised():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from wsi_rt.runtime.interrupts import checkpoint; checkpoint(); "
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
