"""The command line in tests: as a process, in a terminal and without one, or in this process."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from jaxrnn._app.cli import run

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
SMALL = ["--steps", "30", "--hidden-size", "16", "--seq-length", "8", "--batch-size", "4",
         "--eval-every", "10", "--sample-length", "20"]  # fmt: skip

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# root may write anywhere, unless it gives that up.
AS_A_USER = () if os.geteuid() else ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
MAY_WRITE_ANYWHERE = os.geteuid() == 0 and not shutil.which("setpriv")


@contextmanager
def hearing():
    """What is started here hears each signal, even where these tests were told to ignore some."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def start(*args, cwd=None, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **env):
    return start_python(
        "-m", "jaxrnn", *args, cwd=cwd, stdin=stdin, stdout=stdout, text=text, **env
    )  # fmt: skip


def start_python(*args, cwd=None, stdin=None, stdout=subprocess.PIPE, text=True, **env):
    with hearing():
        return subprocess.Popen(
            [sys.executable, *map(os.fspath, args)],
            cwd=cwd, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=text,
            env={**os.environ, "XLA_FLAGS": "", **env},
        )  # fmt: skip


def jaxrnn(*args, **how):
    process = start(*args, **how)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


def wait_for(path, *processes, seconds=120):
    """Until a file is there that these processes make."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert all(process.poll() is None for process in processes), f"ended without {path}"
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def in_terminal(*args, **env):
    """As `jaxrnn`, with standard output on a terminal; without its codes, and with its colours."""
    import pty  # not everywhere

    ours, theirs = pty.openpty()
    process = start(*args, stdout=theirs, TERM="xterm-256color", COLUMNS="100", **env)
    os.close(theirs)
    shown = _read(ours)
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


def _read(terminal):
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            return shown.decode()
        if not part:
            return shown.decode()
        shown += part


def here(capsys, *args):
    """As `jaxrnn`, without a process of its own."""
    capsys.readouterr()
    try:
        code = run([os.fspath(arg) for arg in args])
    except SystemExit as ended:  # argparse
        code = ended.code
    return subprocess.CompletedProcess(args, code, *capsys.readouterr())
