"""A terminal that is closed asks to save and stop; that nothing can be shown any more is no failure."""

import os
import pty
import signal
import subprocess
import sys

from rankclip_jax.parallel.preemption import Notice

CHILD = """
import fcntl, signal, sys, termios, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is its own
from rankclip_jax.parallel.preemption import Notice
with Notice() as notice:
    print("begun", flush=True)
    end = time.monotonic() + 60
    while not notice.reached(1) and time.monotonic() < end:
        time.sleep(0.01)
    print("saving", flush=True)
    open(sys.argv[1], "w").write(f"asked: {notice.reached(1)}")
"""


def test_a_closed_terminal_asks_to_save(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "found")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        assert b"begun" in terminal.read(100)
    assert process.wait(120) == 0 and (tmp_path / "found").read_text() == "asked: True"


def test_where_hanging_up_is_ignored_it_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Notice():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Notice():
            assert callable(signal.getsignal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
