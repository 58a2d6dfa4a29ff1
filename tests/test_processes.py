"""A run of several processes on this machine: the same numbers, and what becomes of the others."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import SMALL, free_address, hearing, here, one_line, succeeded, wait_for
from helpers import assert_close

import jaxrnn
from jaxrnn import train
from jaxrnn._api.checks import InputError
from jaxrnn._app import devices
from jaxrnn._app.checkpoints import Checkpoints
from jaxrnn._app.devices import Placement
from jaxrnn._app.directory import checkpoint_steps

without_pictures = commands.without_pictures

SMALL = [*SMALL, "--eval-every", "1000"]
FOUR = "--xla_force_host_platform_device_count=4"  # of conftest.py
K, H, B, T, STEPS = 5, 8, 8, 6, 20

pytestmark = pytest.mark.usefixtures("compile_once", "without_pictures")


def twenty_steps(layers, model):
    """The state after 20 updates in float64, on all devices that there are."""
    placement, optimizer = Placement(B, H, model), optax.sgd(0.1)
    params = jaxrnn.init_params(jax.random.key(0), K, H, K, layers=layers, dtype=jnp.float64)
    state = placement.put_state(train.init_state(params, optimizer, B))
    ids = np.random.default_rng(0).integers(0, K, (STEPS, 2, T, B)).astype(np.uint8)
    update = train.make_checked_update(optimizer, mesh=placement.mesh)
    for inputs, targets in ids:
        state, _ = update(state, placement.split(inputs, 1), placement.split(targets, 1))
    return state


def drive(what, coordinator, count, index, out="", cases="[]"):
    """One of the processes that the tests start from this file."""
    if what == "wait":
        devices.PATIENCE = 3
    try:
        devices.join(coordinator, int(count), int(index))
    except InputError as error:
        sys.exit(f"error: {error}")
    if what == "order":
        mesh = Placement(B, H, 2).mesh
        print([[device.process_index for device in row] for row in mesh.devices], flush=True)
    for layers, model in json.loads(cases):
        state = twenty_steps(layers, model)
        (folder := Path(out) / f"{layers}-{model}").mkdir(parents=True, exist_ok=True)
        Checkpoints(folder).save(STEPS, state, {}, None)


if __name__ == "__main__":
    drive(*sys.argv[1:])


class Started:
    """A process, and what it has written."""

    def __init__(self, command, folder, **env):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        flags = os.environ["XLA_FLAGS"].replace(FOUR, "")
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": "1", **env}
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            with hearing():
                self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def wait(self, seconds=120):
        return self.popen.wait(seconds)

    @property
    def output(self):
        return (self.folder / "out").read_text()

    @property
    def errors(self):
        return (self.folder / "err").read_text()


@contextmanager
def started(commands, folder, **env):
    """Processes, none of which outlives the block."""
    all_of_them = []
    try:
        for index, command in enumerate(commands):
            all_of_them.append(
                Started([sys.executable, *map(str, command)], folder / str(index), **env)
            )
        yield all_of_them
    finally:
        for each in all_of_them:
            if each.popen.poll() is None:
                each.popen.kill()
                each.popen.wait()


def training(count, *args, others=None):
    """The commands of one run of so many processes; `others`: what process 1 is told instead."""
    address = free_address()
    for index in range(count):
        told = others if index == 1 and others is not None else args
        several = ["--coordinator", address, "--processes", count, "--process", index]
        yield ["-m", "jaxrnn", "train", *told, *(several if count > 1 else [])]


def run(commands, folder, **env):
    with started(commands, folder, **env) as all_of_them:
        codes = [each.wait() for each in all_of_them]
    return codes, all_of_them


def saved(out, like):
    """The state of the newest checkpoint in a run directory."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    return Checkpoints(out).state(checkpoint_steps(out)[-1], shapes)


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "cases"),
    [(2, [(1, 1), (2, 2)]), (4, [(2, 1), (2, 2), (1, 4)])],
)
def test_several_processes_compute_what_one_does(count, cases, tmp_path):
    """Cases: layers, and over how many processes the units are split."""
    address = free_address()
    commands = [
        [__file__, "train", address, count, index, tmp_path, json.dumps(cases)]
        for index in range(count)
    ]
    codes, all_of_them = run(commands, tmp_path / "log", JAX_ENABLE_X64="1")
    assert codes == [0] * count, [each.errors for each in all_of_them]
    for layers, model in cases:
        expected = twenty_steps(layers, 1)
        found = saved(tmp_path / f"{layers}-{model}", expected)
        # As in test_devices: other orders of sums of 48 terms, through 20 steps.
        assert_close(found.params, jax.device_get(expected.params), 1e-12)
        assert_close(found.h, jax.device_get(expected.h), 1e-12)


@pytest.mark.parametrize("model", [1, pytest.param(2, marks=pytest.mark.full)])
def test_two_processes_train_as_one(model, text_file, tmp_path):
    # Of SGD, for Adam makes a full step of the least difference.
    sgd = ["--optimizer", "sgd", "--learning-rate", "0.1", *SMALL, "--steps", STEPS]
    succeeded(here("train", text_file, "--out", tmp_path / "one", *sgd))
    args = [text_file, "--out", tmp_path / "two", *sgd, "--model-devices", model]
    codes, both = run(training(2, *args), tmp_path / "log")
    assert codes == [0, 0], [each.errors for each in both]
    assert [each.errors for each in both] == ["", ""]
    said = "the batch over 2" if model == 1 else "hidden units over 2"
    assert f"2 cpu devices in 2 processes, {said}\n" in both[0].output
    assert f"step {STEPS}/{STEPS}  loss" in both[0].output
    assert "loss" not in both[1].output  # the first speaks for all
    # Sums of 32 terms with eps 1.2e-7, through 20 steps.
    one, two = (commands.state(tmp_path / name) for name in ("one", "two"))
    assert_close([x for x in two if x.ndim], [x for x in one if x.ndim], 1e-4)


# What becomes of the others.

LOST = re.compile(
    r"jaxrnn train: error: lost another process, or the connection to it \(.*\); "
    r"(the last checkpoint is \S+/checkpoints/\d+|there is no checkpoint yet); "
    r"to continue: jaxrnn train --resume \S+\n"
    # JAX's own, where it is the first to notice: it aborts, and cannot be told not to.
    r"|Terminating process because the JAX distributed service detected fatal errors. "
    r"This most likely indicates that another task died"
)
LONG = [*SMALL, "--steps", "200", "--checkpoint-every", "50"]


def lose(number, count, victim, text_file, out, folder):
    """The other processes of a run, after one was sent a signal, and after how many seconds."""
    args = [text_file, "--out", out, *LONG]
    with started(training(count, *args), folder) as all_of_them:
        wait_for(out / "checkpoints" / "50", *(each.popen for each in all_of_them))
        all_of_them[victim].popen.send_signal(number)
        began = time.monotonic()
        others = [each for each in all_of_them if each is not all_of_them[victim]]
        codes = [each.wait() for each in others]
        seconds = time.monotonic() - began
    assert 0 not in codes
    for each in others:
        assert LOST.search(each.errors), each.errors
    plan = all_of_them[0].output
    assert f"if a process is lost the others end within {devices.HEARTBEAT} s; to continue" in plan
    return others, seconds


def finish(count, out, folder):
    codes, all_of_them = run(training(count, "--resume", out, "--sample-length", 0), folder)
    assert codes == [0] * count, [each.errors for each in all_of_them]
    assert re.search(r"continuing from step \d*[05]0 of 200\n", all_of_them[0].output)
    assert max(checkpoint_steps(out)) == 200


def test_after_a_loss_one_process_goes_on(text_file, tmp_path):
    """One of two is killed; the other ends, and the run does as one process."""
    out = tmp_path / "run"
    _, seconds = lose(signal.SIGKILL, 2, 1, text_file, out, tmp_path / "both")
    assert seconds < 60
    output = succeeded(here("train", "--resume", out, "--sample-length", 0))
    assert re.search(r"continuing from step \d*[05]0 of 200\n", output)
    assert max(checkpoint_steps(out)) == 200


@pytest.mark.full
def test_after_a_loss_fewer_processes_go_on(text_file, tmp_path):
    """One of four is killed; two go on from the last checkpoint, and so does one."""
    out = tmp_path / "run"
    _, seconds = lose(signal.SIGKILL, 4, 3, text_file, out, tmp_path / "all")
    assert seconds < 60
    shutil.copytree(out, tmp_path / "copy")
    finish(2, out, tmp_path / "two")
    finish(1, tmp_path / "copy", tmp_path / "one")


@pytest.mark.full
@pytest.mark.parametrize("count", [4, 2])
def test_the_loss_of_the_first_process_ends_the_others(count, text_file, tmp_path):
    _, seconds = lose(signal.SIGKILL, count, 0, text_file, tmp_path / "run", tmp_path)
    assert seconds < 60


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_lost(victim, text_file, tmp_path):
    _, seconds = lose(signal.SIGSTOP, 2, victim, text_file, tmp_path / "run", tmp_path)
    assert seconds < 60


@pytest.mark.full
@pytest.mark.parametrize(("receiver", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_process_stops_all_at_one_step(receiver, number, text_file, tmp_path):
    out = tmp_path / "run"
    args = [text_file, "--out", out, *SMALL, "--steps", 100_000, "--checkpoint-every", "50"]
    with started(training(2, *args), tmp_path) as both:
        wait_for(out / "checkpoints" / "50", *(each.popen for each in both))
        both[receiver].popen.send_signal(number)
        assert [each.wait() for each in both] == [128 + number] * 2
    assert [each.errors for each in both] == ["", ""]
    step = re.search(rf"stopped by {number.name} at step (\d+) of 100000", both[0].output)
    assert int(step[1]) == checkpoint_steps(out)[-1]


@pytest.mark.full
def test_a_process_that_ends_alone_ends_the_others(text_file, tmp_path):
    """At once, by the second signal: it says nothing, and the other one that it is gone."""
    out = tmp_path / "run"
    args = [text_file, "--out", out, *SMALL, "--steps", 100_000, "--checkpoint-every", "50"]
    with started(training(2, *args), tmp_path) as both:
        wait_for(out / "checkpoints" / "50", *(each.popen for each in both))
        began = time.monotonic()
        while both[1].popen.poll() is None:
            both[1].popen.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert both[0].wait() != 0 and time.monotonic() - began < 60
    assert both[1].popen.returncode in (130, -signal.SIGINT)
    assert LOST.search(both[0].errors), both[0].errors


@pytest.mark.full
def test_a_full_disk_of_one_process_ends_all(text_file, tmp_path):
    """Which says what has failed; the other one, that it is gone."""
    out = tmp_path / "run"
    args = [text_file, "--out", out, *LONG]
    commands = [[str(word) for word in command] for command in training(2, *args)]
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        f"sys.argv = ['jaxrnn', *{commands[1][2:]!r}];"
        "runpy.run_module('jaxrnn', run_name='__main__')"
    )
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with started([commands[0], ["-c", limited]], tmp_path, **env) as both:
        codes = [each.wait() for each in both]
    assert 0 not in codes and codes[1] == 1
    assert re.search(r"/checkpoints/50: cannot be written: .*no checkpoint yet", both[1].errors)
    assert LOST.search(both[0].errors), both[0].errors


# What keeps a run from beginning.


def refused(tmp_path, *args, others=None):
    """What two processes say on standard error."""
    began = time.monotonic()
    codes, both = run(training(2, *args, *SMALL, others=others and [*others, *SMALL]), tmp_path)
    assert codes == [2, 2]
    assert time.monotonic() - began < 60
    assert all(len(each.errors.splitlines()) == 1 for each in both), [e.errors for e in both]
    return [each.errors for each in both]


OTHER = (
    "jaxrnn train: error: --process: another process cannot start this run; its message says why\n"
)


def test_other_options_end_the_run(text_file, tmp_path):
    args = [text_file, "--out", tmp_path / "run", "--steps", STEPS]
    first, odd = refused(tmp_path, *args, others=[*args, "--seed", "1"])
    assert re.search(r"error: --seed: expected 0, as in \S+, got 1\n", odd)
    assert first == OTHER


@pytest.mark.full
def test_directories_that_are_not_one_end_the_run(text_file, tmp_path):
    out = tmp_path / "run"
    args = [text_file, "--out", out, *SMALL, "--steps", 50, "--checkpoint-every", "25"]
    succeeded(here("train", *args))
    codes, both = run(training(2, "--resume", out), tmp_path / "finished")
    assert (codes, [each.errors for each in both]) == ([0, 0], ["", ""])
    assert f"{out} is finished: 50 updates" in both[0].output
    assert "finished" not in both[1].output
    shutil.copytree(out, tmp_path / "copy")
    before = sorted(out.rglob("*"))
    resumed = training(2, "--resume", out, others=["--resume", tmp_path / "copy"])
    codes, both = run(resumed, tmp_path / "apart")
    assert codes == [2, 2] and sorted(out.rglob("*")) == before
    for each in both:
        assert "error: --out: expected a directory that all processes see, got " in each.errors
        assert len(each.errors.splitlines()) == 1


def test_processes_begin_only_if_they_agree(monkeypatch):
    """As one of two, of which the other has no error, and "left" as what must be alike."""
    other = devices.zlib.crc32(repr("left").encode()) >> 1

    def largest(number):
        if isinstance(number, bool):
            return number
        return max(number, other if number >= 0 else -other)

    monkeypatch.setattr(devices, "largest", largest)
    devices.agree(None, {"--out: expected one": "left"})
    for value in ("right", 3, None):
        with pytest.raises(devices.RefusedError, match=f"^--out: expected one, got {value} here"):
            devices.agree(None, {"--out: expected one": value})


def test_an_error_of_one_process_is_said_by_both(monkeypatch):
    monkeypatch.setattr(devices, "largest", lambda number: 1)
    with pytest.raises(devices.RefusedError, match="another process cannot start this run"):
        devices.agree(None, {})
    with pytest.raises(devices.RefusedError, match=r"^text: expected more$"):
        devices.agree(InputError("text: expected more"), {})


def test_processes_with_unequal_devices_are_one_line(monkeypatch):
    several = [SimpleNamespace(process_index=n) for n in (0, 1, 1)]
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **how: None)
    monkeypatch.setattr(jax, "devices", lambda: several)
    before = jax.config.jax_enable_preemption_service
    try:
        with pytest.raises(InputError, match=r"--processes: expected as many .*, got 1, 2$"):
            devices.join("a:1", 2, 1)
    finally:
        jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--coordinator", "a:1"], "--coordinator: expected --processes N and --process I with"),
        (["--processes", "2", "--process", "0"], "--coordinator: expected --processes N and"),
        (["--process", "0"], "--process: expected --coordinator HOST:PORT with it"),
        (["--processes", "auto"], "--out: expected a directory that all processes see, got none"),
        (["a:1", 2, 2], "--process: expected a number from 0 to 1, got 2"),
        (["nowhere", 2, 1], "--coordinator: expected HOST:PORT, got nowhere"),
        (["a:http", 2, 1], "--coordinator: expected HOST:PORT, got a:http"),
        (["a:65536", 2, 0], "--coordinator: expected HOST:PORT with a port to listen on, got a:6"),
        (["--processes", "0"], "--processes: expected a whole number, at least 1, got 0"),
    ],
)
def test_bad_addresses_and_numbers_are_one_line(args, message, tmp_path):
    if args[0][0] != "-":
        several = zip(("--coordinator", "--processes", "--process"), map(str, args), strict=True)
        args = ["--out", tmp_path / "run", *(word for pair in several for word in pair)]
    one_line(here("train", *args), 2, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_other_devices_end_the_run(text_file, tmp_path):
    args = [text_file, "--out", tmp_path / "run", "--steps", STEPS]
    said = refused(tmp_path, *args, others=[*args, "--model-devices", "2"])
    assert all("--process: expected the same options in all processes, got" in s for s in said)


@pytest.mark.full
def test_a_text_that_cannot_be_read_ends_the_run(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait" * 100)
    first, second = refused(tmp_path, tmp_path / "latin", "--out", tmp_path / "run")
    assert re.search(r"latin: expected UTF-8, got byte 0xe9 at offset 3", first)
    assert second == OTHER or "expected a run directory" in second
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_too_few_processes_are_one_line(index, tmp_path):
    """The first of two waits for the other, or the second for one that does not listen."""
    address = free_address()
    codes, (alone,) = run([[__file__, "wait", address, 2, index]], tmp_path)
    assert codes == [2] and len(alone.errors.splitlines()) == 1
    assert f"--coordinator: expected all processes at {address} within 3 s" in alone.errors


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        run = here("train", "--out", tmp_path / "run", "--coordinator", address,
                   "--processes", "2", "--process", "0")  # fmt: skip
    one_line(run, 2, "--coordinator: expected HOST:PORT with a port to listen on", address)


@pytest.mark.full
def test_units_are_split_inside_a_process_where_they_fit(tmp_path):
    address = free_address()
    commands = [[__file__, "order", address, 2, index] for index in range(2)]
    codes, both = run(commands, tmp_path, JAX_NUM_CPU_DEVICES="2")
    assert codes == [0, 0]
    assert "[[0, 0], [1, 1]]\n" in both[0].output
