"""The default run of `jaxrnn train` beside `torch.nn.RNN`: the same bits per character, sooner?

The same weights, batches and optimiser on both sides, each in a process of its own, in turn.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, results, workers

SIDES, NAMES = ("jaxrnn", "torch"), "UWbVc"
BITS_APART, VERIFIED_UPDATES, HELD_OUT, HELD_OUT_STREAM = 0.01, 5, 0.1, 4096
READ_EVERY = 25  # Updates between two looks at the losses, as in `jaxrnn train`.

Found = dict[str, Any]  # Seconds, those of the first update, losses, and U, W, b, V, c.
Nats = Callable[[np.ndarray, np.ndarray], float]  # The mean loss of streams (inputs, targets).


@dataclass(frozen=True)
class Run:
    """The defaults of `jaxrnn train`; `steps` is where the cosine ends, `updates` where we do."""

    steps: int = 2000
    updates: int = 2000
    hidden_size: int = 256
    seq_length: int = 64
    batch_size: int = 64
    learning_rate: float = 3e-3
    grad_clip: float = 1.0
    seed: int = 0


def train_jaxrnn(params: Any, windows: Iterator, run: Run) -> tuple[Found, Nats]:
    """Train as `jaxrnn train` does: the batch split over JAX's devices, parameters on each."""
    import jax
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxrnn import train

    devices = jax.local_devices()
    mesh = Mesh(np.array(devices[: math.gcd(run.batch_size, len(devices))]), ("data",))

    def place(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    rate = optax.cosine_decay_schedule(run.learning_rate, run.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(run.grad_clip), optax.adam(rate))
    update = train.make_update(optimizer)
    state = place(train.init_state(params, optimizer, run.batch_size))
    state = replace(state, h=place(state.h, "data"))

    def step(inputs, targets, first):
        nonlocal state
        before = train.start_over(state) if first else state
        state, loss = update(before, place(inputs, None, "data"), place(targets, None, "data"))
        return loss

    found = _timed(step, windows, run.updates)
    params = jax.device_put(state.params, devices[0])
    cell, readout = params.cell, params.readout
    found |= dict(U=cell.U, W=cell.W, b=cell.b, V=readout.V, c=readout.c)
    return found, lambda *streams: train.evaluate(params, *streams)


def train_torch(params: Any, windows: Iterator, run: Run) -> tuple[Found, Nats]:
    """Train a `torch.nn.RNN` and a `torch.nn.Linear` from jaxrnn's weights of one layer."""
    import torch

    import jaxrnn

    rnn = jaxrnn.to_torch(params.cell)
    # One bias, as in jaxrnn: Adam would move the sum of two twice as far.
    rnn.bias_hh_l0.requires_grad_(False)
    V, c = (torch.from_numpy(np.array(x)) for x in (params.readout.V, params.readout.c))
    readout = torch.nn.Linear(*reversed(V.shape), dtype=V.dtype)
    readout.load_state_dict({"weight": V, "bias": c})
    trained = [rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, readout.weight, readout.bias]
    # Fused is the fastest of torch's three on a CPU; betas and eps are optax's too.
    optimizer = torch.optim.Adam(trained, run.learning_rate, (0.9, 0.999), 1e-8, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: 0.5 * (1 + math.cos(math.pi * min(count, run.steps) / run.steps))
    )
    one_hot, h = torch.eye(params.cell.U.shape[1], dtype=V.dtype), None

    def tensors(inputs, targets):
        return one_hot[torch.from_numpy(inputs).long()], torch.from_numpy(targets).long().flatten()

    def loss_of(xs, targets, h):
        hs, h = rnn(xs, h)
        logits = readout(hs).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets), h.detach()

    def step(xs, targets, first):
        nonlocal h
        loss, h = loss_of(xs, targets, None if first else h)
        optimizer.zero_grad()
        loss.backward()
        # Where the norm is above grad_clip this divides by norm + 1e-6, and optax by the norm:
        # with grad_clip 1, gradients are smaller by a millionth at most.
        torch.nn.utils.clip_grad_norm_(trained, run.grad_clip)
        optimizer.step()
        schedule.step()
        return loss.detach()

    @torch.inference_mode()
    def nats(*streams):
        return float(loss_of(*tensors(*streams), None)[0])

    # One-hot rows are made beforehand, which is faster for torch, until the streams start over.
    ready = []
    for inputs, targets, first in islice(windows, run.updates):
        if first and ready:
            break
        ready.append((*tensors(inputs, targets), first))
    found = _timed(step, cycle(ready), run.updates)
    return found | {name: x.detach().numpy() for name, x in zip(NAMES, trained, strict=True)}, nats


def _timed(step: Callable, windows: Iterable, updates: int) -> Found:
    losses, first, begun = [], math.nan, time.perf_counter()
    for n, window in enumerate(islice(windows, updates)):
        losses.append(step(*window))
        if n == 0:
            losses, first = [float(losses[0])], time.perf_counter() - begun
        elif n % READ_EVERY == 0 or n == updates - 1:
            losses = [float(loss) for loss in losses]
    return {"losses": losses, "seconds": time.perf_counter() - begun, "first": first}


def differences(one: Found, other: Found, start: Found, run: Run) -> dict[str, float]:
    """How far two sides are apart after a few updates, in units of what rounding explains.

    The first loss: ε for each of T steps. The change of each parameter: ε / (1 − β₂) of its norm,
    because Adam divides by 1 − β₂ᵗ, which optax rounds in float32 and torch in float64.
    """
    eps, (mine, theirs) = float(np.finfo(np.float32).eps), (one["losses"][0], other["losses"][0])
    found = {"loss": float(abs(mine - theirs) / (run.seq_length * eps * theirs))}
    for name in NAMES:
        change = np.linalg.norm(other[name] - start[name]) * eps / (1 - 0.999)
        found[name] = float(np.linalg.norm(one[name] - other[name]) / change)
    return found


def _work(side: str, options: str, path: str) -> int:
    """What a process does: train one side and leave in a file what it found."""
    from pydoc_data.topics import topics

    import jax

    import jaxrnn
    from jaxrnn import train

    run, text = Run(**json.loads(options)), "".join(topics.values())
    vocabulary = jaxrnn.Vocabulary(text)
    ids, kept, size = vocabulary.encode(text), round(len(text) * HELD_OUT), len(vocabulary)
    params = jaxrnn.init_params(jax.random.key(run.seed), size, run.hidden_size, size)
    windows = train.windows(*train.streams(ids[:-kept], run.batch_size), run.seq_length)
    count = 2 ** int(math.log2(min(run.batch_size, max(1, kept // HELD_OUT_STREAM))))
    if side == "torch":
        import torch

        torch.set_num_threads(machine.cores())
    found, nats = (train_torch if side == "torch" else train_jaxrnn)(params, windows, run)
    bits = nats(*train.streams(ids[-kept:], count)) / math.log(2)
    np.savez(path, bits=bits, **found)
    return 0


def measure(side: str, run: Run) -> Found:
    """Train one side in a process of its own; torch's only draws its weights with JAX."""
    devices = machine.cores() if side == "jaxrnn" else 1  # Each core one, as `jaxrnn train` does.
    chosen = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment = workers.environment(workers.JAX, "cpu") | chosen
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.torch_training", "--worker", side]
        path = f"{folder}/found.npz"
        subprocess.run([*command, json.dumps(asdict(run)), path], env=environment, check=True)
        with np.load(path) as found:
            return dict(found)


def compare(run: Run, rounds: int) -> tuple[bool, Found]:
    """Check that both are the same computation, train both in turn, and print what came out."""
    few = replace(run, updates=VERIFIED_UPDATES)
    start = measure("torch", replace(run, updates=0))
    errors = differences(measure("jaxrnn", few), measure("torch", few), start, run)
    worst = max(errors.values())
    print(f"after {few.updates} updates apart by {worst:.2g} of what rounding explains", flush=True)
    if not all(error <= 1 for error in errors.values()):
        return False, {"differences": errors}
    keys = ("held-out bits", "seconds", "after the first update")
    figures = np.empty((rounds, len(SIDES), len(keys)))
    for n in range(rounds):
        for side in range(len(SIDES))[:: (-1) ** n]:
            found = measure(SIDES[side], run)
            seconds = float(found["seconds"])
            figures[n, side] = found["bits"], seconds, seconds - float(found["first"])
    print(f"{run.updates:,} updates on {machine.describe(machine.device())}; medians of {rounds}")
    print(" " * 14 + "  ".join(keys))
    for side, (bits, seconds, later) in zip(SIDES, np.median(figures, 0), strict=True):
        print(f"{side:14}{bits:13.4f}{seconds:9.1f}{later:24.1f}")
    apart = float(max(figures[:, 0, 0] - figures[:, 1, 0], key=abs))
    ratio, later = map(float, np.median(figures[:, 1, 1:] / figures[:, 0, 1:], 0))
    print(f"{'apart; ratio':14}{apart:+13.4f}{ratio:9.2f}{later:24.2f}")
    found = {"bits apart": apart, "torch over jaxrnn": ratio, "after the first update": later}
    found |= {"differences": errors, "rounds of": [SIDES, keys], "rounds": figures.tolist()}
    return abs(apart) <= BITS_APART and ratio > 1, found


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, print a table; exit 1 if bits differ by over 0.01 or jaxrnn takes longer."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.torch_training", description=main.__doc__
    )
    parser.add_argument("--steps", type=int, default=Run.steps, help="(default: 2000)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(*options.worker)
    if min(options.steps, options.rounds) < 1:
        parser.error("--steps and --rounds: expected at least 1")
    if options.output:
        results.check_writable(options.output)
    run = Run(steps=options.steps, updates=options.steps)
    passed, found = compare(run, options.rounds)
    if options.output:
        versions = {**machine.versions(), "optax": version("optax")}
        document = results.new(machine.device(), versions, {"rounds": options.rounds})
        results.write({**document, "training": {**asdict(run), **found}}, options.output)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
