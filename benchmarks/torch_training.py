"""The default run of `jaxrnn train` beside `torch.nn.RNN`: the same bits per character, sooner?

The same weights, batches and optimiser on both sides, each in a process of its own, in turn. In
float64 the losses of the first updates agree to rounding. Then training is chaotic: rounding, in
any dtype and on either side, ends a run some hundredths of a bit from where it would have. So the
whole run is made from several seeds, in float32, and their mean is compared.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import machine, results, workers
from benchmarks.training_sides import Found, Run, train_jaxrnn, train_torch

SIDES = ("jaxrnn", "torch")
BITS_APART, HELD_OUT, HELD_OUT_STREAM = 0.01, 0.1, 4096
# A step's ε, summed over T = 64 of them and divided by Adam's 1 − β₂, is 1.4e-11. At 100 updates
# what is left of it has grown to 1e-6, at 200 to 1e-3.
VERIFIED_UPDATES, LOSSES_APART = 50, 1e-10
KEYS = ("held-out bits", "seconds", "after the first update")


def _work(side: str, options: str, path: str) -> int:
    """What a process does: train one side and leave in a file what it found."""
    from pydoc_data.topics import topics

    import jax

    import jaxrnn
    from jaxrnn import train

    run, text = Run(**json.loads(options)), "".join(topics.values())
    vocabulary = jaxrnn.Vocabulary(text)
    ids, kept, size = vocabulary.encode(text), round(len(text) * HELD_OUT), len(vocabulary)
    key = jax.random.key(run.seed)
    params = jaxrnn.init_params(key, size, run.hidden_size, size, dtype=run.dtype)
    windows = train.windows(*train.streams(ids[:-kept], run.batch_size), run.seq_length)
    count = 2 ** int(math.log2(min(run.batch_size, max(1, kept // HELD_OUT_STREAM))))
    found, nats = (train_torch if side == "torch" else train_jaxrnn)(params, windows, run)
    bits = nats(*train.streams(ids[-kept:], count)) / math.log(2)
    np.savez(path, bits=bits, **found)
    return 0


def measure(side: str, run: Run) -> Found:
    """Train one side in a process of its own; torch's only draws its weights with JAX."""
    devices = machine.cores() if side == "jaxrnn" else 1  # Each core one, as `jaxrnn train` does.
    chosen = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)}
    chosen["JAX_ENABLE_X64"] = str(int(run.dtype == "float64"))
    environment = workers.environment(workers.JAX, "cpu") | chosen
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.torch_training", "--worker", side]
        path = f"{folder}/found.npz"
        subprocess.run([*command, json.dumps(asdict(run)), path], env=environment, check=True)
        with np.load(path) as found:
            return dict(found)


def compare(run: Run, rounds: int) -> tuple[bool, Found]:
    """Check that both are the same computation, train both in turn, and print what came out."""
    few = replace(run, updates=VERIFIED_UPDATES, dtype="float64")
    mine, theirs = (measure(side, few)["losses"] for side in SIDES)
    error = float(np.max(np.abs(mine - theirs) / theirs))
    print(f"losses of {few.updates} updates in float64: apart by {error:.1e} at most", flush=True)
    if not error <= LOSSES_APART:
        return False, {"losses apart": error}
    figures = np.empty((rounds, len(SIDES), len(KEYS)))
    for n in range(rounds):
        for side in range(len(SIDES))[:: (-1) ** n]:
            found = measure(SIDES[side], replace(run, seed=n))
            seconds = float(found["seconds"])
            figures[n, side] = found["bits"], seconds, seconds - float(found["first"])
    print(f"{run.updates:,} updates in {run.dtype}, from {rounds} seeds; means and median ratios")
    print(" " * 14 + "  ".join(KEYS))
    for side, (bits, seconds, later) in zip(SIDES, np.mean(figures, 0), strict=True):
        print(f"{side:14}{bits:13.4f}{seconds:9.1f}{later:24.1f}")
    apart = figures[:, 0, 0] - figures[:, 1, 0]
    mean, most = float(np.mean(apart)), float(max(apart, key=abs))
    error_of_mean = float(np.std(apart, ddof=1)) / math.sqrt(rounds) if rounds > 1 else math.nan
    ratio, later = map(float, np.median(figures[:, 1, 1:] / figures[:, 0, 1:], 0))
    print(f"{'apart; ratio':14}{mean:+13.4f}{ratio:9.2f}{later:24.2f}")
    print(f"standard error of the mean {error_of_mean:.4f}, one run apart by {most:+.4f} at most")
    return abs(mean) <= BITS_APART and ratio > 1, {
        "losses apart": error, "bits apart": mean, "standard error": error_of_mean,
        "at most": most, "torch over jaxrnn": ratio, KEYS[2]: later,
        "rounds of": [SIDES, KEYS], "rounds": figures.tolist(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train both; exit 1 if mean bits differ by more than 0.01, or jaxrnn takes longer."""
    parser = argparse.ArgumentParser("python -m benchmarks.torch_training", None, main.__doc__)
    parser.add_argument("--steps", type=int, default=Run.steps, help="(default: 2000)")
    parser.add_argument("--rounds", type=int, default=10, help="seeds (default: 10)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(*options.worker)
    if min(options.steps, options.rounds) < 1:
        parser.error("--steps and --rounds: expected at least 1")
    if options.output:
        results.check_writable(options.output)
    run, device = Run(steps=options.steps, updates=options.steps), machine.device()
    print(machine.describe(device), flush=True)
    passed, found = compare(run, options.rounds)
    if options.output:
        versions = {**machine.versions(), "optax": version("optax")}
        document = results.new(device, versions, {"rounds": options.rounds})
        results.write({**document, "training": {**asdict(run), **found}}, options.output)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
