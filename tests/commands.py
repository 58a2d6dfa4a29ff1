"""The command line in tests: in this process, in another one, in a terminal and without one."""

import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrnn import train
from jaxrnn._app import run as run_module

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
SMALL = ["--steps", "30", "--hidden-size", "16", "--seq-length", "8", "--batch-size", "4",
         "--eval-every", "10", "--sample-length", "0"]  # fmt: skip
LONG = [*SMALL, "--steps", "1000000"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# root may write anywhere, unless it gives that up.
AS_A_USER = () if os.geteuid() else ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
MAY_WRITE_ANYWHERE = os.geteuid() == 0 and not shutil.which("setpriv")
needs_rights = pytest.mark.skipif(MAY_WRITE_ANYWHERE, reason="root may read and write everywhere")


@contextmanager
def as_users_have_it():
    """Float32, and the promotion that optax needs."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


# In this process.


def here(*args, stdin=b"", stdout=None, encoding="utf-8", text=True, x64=False):
    """The command `jaxrnn`, run in this process; `stdout` is a file, if it is given.

    Args:
      args: as on the command line.
      stdin: what standard input holds, or a binary file.
      stdout: a file; output is returned if there is none.
      encoding: of standard output and standard error.
      text: whether output is returned as text, else as bytes.
      x64: as JAX's option of that name.
    """
    from jaxrnn.__main__ import main

    reader = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
    output, errors = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(x64):
        patch.setattr(sys, "argv", ["jaxrnn", *map(os.fspath, map(_word, args))])
        patch.setattr(sys, "stdin", io.TextIOWrapper(reader))
        if stdout is None:
            stdout = io.TextIOWrapper(output, encoding, write_through=True)
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding, write_through=True))
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        written = output.getvalue(), errors.getvalue()
    if text:
        written = tuple(each.decode(encoding) for each in written)
    return subprocess.CompletedProcess(args, code, *written)


def _word(arg):
    return arg if isinstance(arg, os.PathLike) else str(arg)


def in_terminal(*args, term="xterm-256color", columns=100):
    """As `here`, with standard output on a terminal; without the codes that move and colour."""
    ours, theirs = pty.openpty()
    shown = []
    reading = threading.Thread(target=lambda: shown.append(_read(ours)))
    reading.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", term)
        patch.setenv("COLUMNS", str(columns))
        with closing(os.fdopen(theirs, "w")) as terminal:
            run = here(*args, stdout=terminal)
    reading.join()
    os.close(ours)
    run.stdout = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[0].decode())
    return run


def _read(terminal):
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            return shown
        if not part:
            return shown
        shown += part


@contextmanager
def signalled(number, path):
    """In this block this process is sent a signal as soon as a file holds something."""
    stop = threading.Event()

    def watch():
        while not stop.wait(0.01):
            if path.exists() and path.stat().st_size:
                os.kill(os.getpid(), number)
                return

    before = signal.signal(number, signal.default_int_handler)
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join()
        signal.signal(number, before)


def one_line(run, code, *parts):
    """That a command has failed with this code and one line that has these parts in this order."""
    assert run.returncode == code, run
    assert run.stderr.count("\n") == 1 and run.stderr.endswith("\n"), run.stderr
    at = 0
    for part in parts:
        assert (at := run.stderr.find(str(part), at)) >= 0, (part, run.stderr)


def succeeded(run):
    assert (run.returncode, run.stderr) == (0, ""), run
    return run.stdout


# In another process.


@contextmanager
def hearing():
    """What is started here hears each signal, even where these tests ignore some."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def start_python(*args, prefix=(), **how):
    """A process of this Python; keywords are environment variables, but for those of `Popen`."""
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    env = {name: how.pop(name) for name in list(how) if name.isupper()}
    with hearing():
        return subprocess.Popen(
            [*prefix, sys.executable, *map(os.fspath, map(_word, args))],
            text=True, env={**os.environ, **env}, **how,
        )  # fmt: skip


def start(*args, **how):
    return start_python("-m", "jaxrnn", *args, **how)


def jaxrnn(*args, **how):
    """The command as a process of its own."""
    process = start(*args, **how)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


def wait_for(path, *processes, seconds=120):
    """Until a file exists that these processes make."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert all(process.poll() is None for process in processes), f"ended without {path}"
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


class Interpreter:
    """A process that runs commands one after the other, each as `here` does.

    `before` is code to run first.
    """

    def __init__(self, **how):
        how["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        self._process = start_python(
            "-c", "from commands import serve; serve()", stdin=subprocess.PIPE, **how
        )

    def __call__(self, *args, before=""):
        words = list(map(os.fspath, map(_word, args)))
        self._process.stdin.write(json.dumps([before, words]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._process.stderr.read()
        return subprocess.CompletedProcess(args, *json.loads(answer))

    def close(self):
        self._process.communicate(timeout=60)


def serve():
    answers = sys.stdout
    for line in sys.stdin:
        before, args = json.loads(line)
        exec(before, {})
        run = here(*args)
        print(json.dumps([run.returncode, run.stdout, run.stderr]), file=answers, flush=True)


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


# Runs.


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of a run of 30 updates with checkpoints at 10, 20 and 30; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "fox.txt").write_text(TEXT)
    run = here("train", folder / "fox.txt", "--out", folder / "run", *SMALL,
               "--checkpoint-every", "10")  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return folder / "run"


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of that run as if it had been stopped at step 20."""
    out = shutil.copytree(finished, tmp_path / "stopped")
    shutil.rmtree(out / "checkpoints" / "30")
    return out


@pytest.fixture
def without_pictures(monkeypatch):
    """No curves are drawn, which takes as long as a small network's training."""
    monkeypatch.setattr("jaxrnn._app.show.plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def updates_once():
    """Runs of one network, optimiser and mesh in this process share one compiled update."""
    make, make_optimizer = train.make_checked_update, run_module.make_optimizer
    optimizer = cache(lambda *options: make_optimizer(run_module.Config(**dict(options))))
    update = cache(lambda optimizer, mesh: make(optimizer, mesh=mesh))
    needed = ("learning_rate", "steps", "optimizer", "grad_clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_optimizer", lambda config: optimizer(
            *((name, getattr(config, name)) for name in needed)
        ))  # fmt: skip
        patch.setattr(train, "make_checked_update", lambda optimizer, mesh=None: update(
            optimizer, mesh
        ))  # fmt: skip
        yield


@pytest.fixture
def prepared_only(monkeypatch):
    """`jaxrnn train` reads its text and makes its directory, but does not train."""
    monkeypatch.setattr("jaxrnn._app.train._run", lambda *_: 0)


@pytest.fixture(scope="session")
def user():
    """The command as somebody who is not root has it."""
    with ExitStack() as opened:
        if os.geteuid():
            yield here
        else:
            yield opened.enter_context(closing(Interpreter(prefix=AS_A_USER)))


def state(out):
    """The arrays of the newest checkpoint of a run."""
    from jaxrnn._app.run import load

    with as_users_have_it():
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load(out)[0])]


def assert_same_state(out, expected):
    for actual, leaf in zip(state(out), state(expected), strict=True):
        np.testing.assert_array_equal(actual, leaf)


def metrics(out):
    """The rows of the metrics without what hangs on the clock."""
    from jaxrnn._app.directory import read_metrics

    wanted = ("step", "loss", "bits", "held_out_bits")
    return [{key: row[key] for key in wanted if key in row} for row in read_metrics(out)]


def files(folder):
    """The contents of all files in a directory."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip
