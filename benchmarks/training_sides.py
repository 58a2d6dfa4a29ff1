"""The two sides of `torch_training`: one network, trained by jaxrnn and by torch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks import machine

NAMES = "UWbVc"  # The parameters that a side leaves behind.
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
    dtype: str = "float32"


def train_jaxrnn(params: Any, windows: Iterator, run: Run) -> tuple[Found, Nats]:
    """Train as `jaxrnn train` does: the batch split over JAX's devices, parameters on each."""
    import jax
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxrnn import train

    devices = jax.local_devices()[: math.gcd(run.batch_size, jax.local_device_count())]
    mesh = Mesh(np.array(devices), ("data",))

    def place(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    rate = optax.cosine_decay_schedule(run.learning_rate, run.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(run.grad_clip), optax.adam(rate))
    update = train.make_update(optimizer, mesh=mesh)
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

    torch.set_num_threads(machine.cores())
    rnn = jaxrnn.to_torch(params.cell)
    # One bias, as in jaxrnn: Adam would move the sum of two twice as far.
    rnn.bias_hh_l0.requires_grad_(False)
    V, c = (torch.from_numpy(np.array(x)) for x in (params.readout.V, params.readout.c))
    readout = torch.nn.Linear(*reversed(V.shape), dtype=V.dtype)
    readout.load_state_dict(dict(weight=V, bias=c))
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
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        # What clips adds 1e-6 to the norm, and optax does not.
        torch.nn.utils.clip_grads_with_norm_(trained, run.grad_clip, norm - 1e-6)
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
        if n % READ_EVERY == 0 or n == updates - 1:
            losses = [float(loss) for loss in losses]
        if n == 0:
            first = time.perf_counter() - begun
    return {"losses": losses, "seconds": time.perf_counter() - begun, "first": first}
