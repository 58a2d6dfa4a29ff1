"""Runs that are killed at any moment: nothing is lost, and they end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrnn._app import directory
from jaxrnn._app.run import load

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
OPTIONS = ["--steps", "40", "--hidden-size", "16", "--seq-length", "8", "--batch-size", "4",
           "--eval-every", "10", "--checkpoint-every", "3", "--sample-length", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Begin a command on two devices; the processes share compiled programs."""
    cache = tmp_path_factory.getbasetemp().parent / "jax-cache"
    environment = {
        **os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    text = tmp_path_factory.mktemp("text") / "fox.txt"
    text.write_text(TEXT)

    def start(out, resume=False):
        which = ["--resume", out] if resume else [text, "--out", out, *OPTIONS]
        return subprocess.Popen(
            [sys.executable, "-m", "jaxrnn", "train", *map(str, which)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The state and the metrics of a run in one go."""
    out = tmp_path_factory.mktemp("runs") / "run"
    process = start(out)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return state(out), metrics(out)


def state(out):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load(out)[0])]


def metrics(out):
    """What does not hang on the clock."""
    wanted = ("step", "loss", "bits", "held_out_bits")
    return [{k: row[k] for k in wanted if k in row} for row in directory.read_metrics(out)]


def die(process, out, generator):
    """Kill it while it saves, or when some more metrics are there, or some time after its start."""
    way = generator.choice(["save", "save", "row", "time"])
    rows = out / directory.METRICS
    before, wait = len(metrics(out)), generator.random()
    deadline = time.monotonic() + (6 * wait if way == "time" else 60)
    more = generator.randrange(1, 6)
    while process.poll() is None and time.monotonic() < deadline:
        if way == "save" and any((out / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.05 * wait)
            break
        if way == "row" and rows.exists() and len(rows.read_text().splitlines()) >= before + more:
            time.sleep(0.2 * wait)
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return way


@pytest.mark.parametrize(
    ("seed", "least"), [(0, 4), pytest.param(1, 30, marks=pytest.mark.full)], ids=["few", "many"]
)
def test_a_run_that_is_killed_again_and_again(seed, least, start, undisturbed, tmp_path):
    """Each run is killed until it has ended; then another one is begun, until there were enough."""
    generator, kills, ways, runs = random.Random(seed), 0, [], 0
    while kills < least:
        out, newest, killed = tmp_path / f"run-{runs}", 0, 0
        runs += 1
        while True:
            begun = (out / directory.CONFIG).exists()
            process = start(out, resume=begun)
            # So that it comes to its end: no more than a few times each.
            if killed < 6:
                ways.append(die(process, out, generator))
            output, errors = process.communicate(timeout=120)
            killed, kills = killed + 1, kills + (process.returncode == -signal.SIGKILL)
            said = f"after {ways}: {output}{errors}"
            assert process.returncode in (0, -signal.SIGKILL), said
            if (out / directory.CONFIG).exists():
                json.loads((out / directory.CONFIG).read_text())
                directory.read_metrics(out)
            steps = directory.checkpoint_steps(out)
            assert max(steps, default=0) >= newest, said
            newest = max(steps, default=0)
            if newest:
                state(out)  # which reads the newest, and looks at every bit of it
            if process.returncode == 0:
                break
        for found, expected in zip(state(out), undisturbed[0], strict=True):
            np.testing.assert_array_equal(found, expected)
        assert metrics(out) == undisturbed[1]
    print(f"{kills} kills in {runs} runs: {ways}")
