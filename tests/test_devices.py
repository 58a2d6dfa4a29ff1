"""A training run whose batch is split over the devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_close, random_case

from jaxrnn import train
from jaxrnn._training.devices import Placement


@pytest.mark.parametrize(("batch_size", "count"), [(8, 4), (6, 2), (5, 1)])
def test_the_batch_is_split_and_the_parameters_are_everywhere(batch_size, count):
    placement = Placement(batch_size)
    x = placement.split(jnp.zeros((batch_size, 3)))
    assert [s.data.shape for s in x.addressable_shards] == [(batch_size // count, 3)] * count
    x = placement.split(jnp.zeros((7, batch_size)), 1)
    assert [s.data.shape for s in x.addressable_shards] == [(7, batch_size // count)] * count
    W = placement.everywhere(jnp.zeros((3, 3)))
    assert [s.data.shape for s in W.addressable_shards] == [(3, 3)] * count
    assert len(placement.together(W).devices()) == 1


def test_a_split_batch_trains_as_a_whole_one():
    params, *_ = random_case(D=5, K=5, H=8)
    ids = jnp.arange(48, dtype=jnp.int32).reshape(6, 8) % 5
    optimizer = optax.sgd(0.1)

    def trained(placement):
        state = train.init_state(params, optimizer, 8)
        if placement is not None:
            state = placement.everywhere(state)
        update = train.make_update(optimizer)
        for _ in range(5):
            pair = (ids, (ids + 1) % 5)
            if placement is not None:
                pair = tuple(placement.split(x, 1) for x in pair)
            state, loss = update(state, *pair)
        return state.params, loss

    split, whole = trained(Placement(8)), trained(None)
    assert len(jax.devices()) == 4
    # Sums over the batch in another order, through five updates.
    assert_close(jax.device_put(split, jax.devices()[0]), whole, 1e-11)


@pytest.mark.parametrize("chosen", ["", "--xla_force_host_platform_device_count=3"])
def test_cores_are_devices_unless_somebody_has_chosen(chosen):
    code = (
        "from jaxrnn._training import devices; devices.make_cores_devices();"
        "import jax; print(len(jax.devices())); devices.make_cores_devices()"
    )
    environment = {**os.environ, "XLA_FLAGS": chosen, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(found) == (3 if chosen else cores)
