"""The arithmetic of many devices, against numbers computed by hand and XLA's own count."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxrnn
from benchmarks import hardware as sheets
from benchmarks import scaling
from benchmarks import update_cost as arithmetic
from benchmarks.collectives import collective, within
from benchmarks.hardware import H100, V5P
from benchmarks.tables import number
from benchmarks.update_cost import best, model_axis_from, update_cost

# Round numbers, a switch for 4 devices, and nothing on the chip.
PLAIN = sheets.Hardware(
    "plain", flops=1e9, float32_flops=5e8, memory=1e9, memory_bandwidth=1e6, on_chip=0, step=0.0,
    joined=4, torus=False, link_bandwidth=1e5, start=1.0, hop=0.1, network_bandwidth=1e4,
    network_hop=0.5,
)  # fmt: skip


@pytest.mark.parametrize("T", [1, 8])
def test_flops_are_those_that_xla_counts(T):
    H, K, B = 96, 64, 32
    params = jaxrnn.init_params(jax.random.key(0), K, H, K)
    ids, h0 = jnp.zeros((T, B), jnp.int32), jnp.zeros((B, H), params.cell.W.dtype)

    @jax.jit
    def gradients(params, ids, h0):
        return jaxrnn.loss_and_grads(params, jaxrnn.Ids(ids), ids, h0=h0)

    counted = gradients.lower(params, ids, h0).compile().cost_analysis()["flops"]
    # XLA counts the body of a loop once: of each loop one product, where T run.
    expected = arithmetic.update_flops(H, B, T, K) - 2 * (T - 1) * 2 * B * H * H
    # What it counts besides is elementwise.
    assert expected <= counted <= 1.05 * expected


def test_parameters_are_those_of_a_network():
    params = jaxrnn.init_params(jax.random.key(0), 7, 5, 7)
    assert arithmetic.parameters(5, 7) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_one_device_by_hand():
    T, K, H, B = 10, 1, 10, 2
    cost = update_cost(H, B, 1, 1, PLAIN, T=T, K=K)
    assert cost.flops == 6 * 2 * 10 * 10 * 11 == 13_200
    assert cost.compute == pytest.approx(cost.flops / 1e9)
    # A step reads W (200 bytes), forward two arrays of 40 bytes, backward three.
    steps = 10 * (200 + 80) + 10 * (200 + 120)
    # Four arrays [T, B, H] and hs again, logits twice; seven arrays of 131 float32 parameters.
    after = 2 * 10 * 2 * (5 * 10 + 2 * 1) + 7 * 4 * 131
    assert cost.memory == cost.total == pytest.approx((steps + after) / 1e6)
    assert (cost.bound_by, cost.sent, cost.gradient_allreduce) == ("memory", 0, 0)
    # Six arrays of parameters, three of states [T, B, H], four of logits.
    assert cost.held == 6 * 4 * 131 + 2 * 10 * 2 * (3 * 10 + 4 * 1)


def test_collectives_by_hand():
    assert collective(PLAIN, 800.0, 1, 1, 2) == (0, 0)
    # Half of the bytes each way, and a hop: 1 + 2 · 0.1 + 2 · 400 / 1e5.
    assert collective(PLAIN, 800.0, 2, 1, 2) == pytest.approx((1.208, 800))
    # Four joined, two such groups: a quarter of the array goes between them, half of it each way.
    assert collective(PLAIN, 800.0, 4, 2, 1) == pytest.approx((1 + 0.2 + 0.5 + 100 / 1e4, 700))
    # A cube of 4 × 4 × 4 has six links for each chip, and at most two hops on each axis.
    assert within(V5P, 64) == (6, 6 * 100e9)
    assert within(V5P, 8) == (3, 3 * 100e9)


def test_the_mesh_by_hand():
    T, K, H, B = 10, 1, 10, 8
    # Model 2 inside a host of 4, so data is 2 inside and 2 hosts.
    cost = update_cost(H, B, 4, 2, PLAIN, T=T, K=K)
    gather, reduce = 1 + 0.1 + 20 / 1e5, 1 + 0.2 + 40 / 1e5  # of [2, 10] in 2 bytes
    assert cost.step_collectives == pytest.approx(T * (gather + reduce))
    # Half of 131 parameters in 4 bytes: 262 bytes over a link, 131 over the network.
    assert cost.gradient_allreduce == pytest.approx(1 + 0.2 + 1.0 + 131 / 1e4)
    # All states of [10, 2, 10], and logits [10, 2, 1] there and back.
    assert cost.other_collectives == pytest.approx(1.1 + 200 / 1e5 + 1.2 + 40 / 1e5)
    assert cost.sent == pytest.approx(T * (20 + 40) + 200 + 40 + 262 + 131)
    assert cost.bound_by == "model"
    # Half of the parameters, of three arrays of states half the units, and all of one gathered.
    assert cost.held == 6 * 2 * 131 + 2 * 10 * 2 * (3 * 5 + 10 + 4 * 1)


@pytest.mark.parametrize("hardware", [H100, V5P])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (64, 1), (16, 4), (64, 16), (8, 128)])
def test_better_hardware_is_never_slower(hardware, data, model):
    before = update_cost(4096, 4096, data, model, hardware)
    for name in ("flops", "memory_bandwidth", "link_bandwidth", "network_bandwidth"):
        better = replace(hardware, **{name: 2 * getattr(hardware, name)})
        assert update_cost(4096, 4096, data, model, better).total <= before.total
    for name in ("start", "hop", "network_hop", "step"):
        better = replace(hardware, **{name: getattr(hardware, name) / 2})
        assert update_cost(4096, 4096, data, model, better).total <= before.total
    assert before.total >= max(before.compute, before.steps, before.gradient_allreduce)


@pytest.mark.parametrize("hardware", [H100, V5P])
def test_no_cost_is_below_its_parts_and_more_devices_do_the_same_work(hardware):
    for H in arithmetic.SIZES:
        found = {n: best(H, scaling.STRONG_BATCH, n, hardware) for n in scaling.DEVICES}
        costs = [cost for cost in found.values() if cost is not None]
        assert len(costs) >= 3 and len({cost.flops for cost in costs}) == 1
        alone = update_cost(H, scaling.STRONG_BATCH, 1, 1, hardware)
        for n, cost in found.items():
            if cost is None:
                assert alone.held > n * hardware.memory
                continue
            assert cost.data * cost.model == n
            assert cost.compute == pytest.approx(alone.compute / n)
            assert cost.total >= alone.compute / n
        assert [cost.total for cost in costs] == sorted((c.total for c in costs), reverse=True)


def test_the_model_axis_wins_only_where_w_leaves_the_chip():
    # 50 MB of L2 are 5,000 rows of bfloat16, 3,535 of float32; 128 MiB of VMEM are 8,192, 5,792.
    for hardware, bfloat16, float32 in ((H100, 5120, 3584), (V5P, 8448, 5888)):
        for devices in (8, 64, 1024):
            assert model_axis_from(hardware, 64 * devices, devices) == bfloat16
            assert model_axis_from(hardware, 64 * devices, devices, 4) == float32
        # With 512 rows for each device the product takes longer than reading W.
        assert model_axis_from(hardware, 4096, 8) is None
        free = replace(hardware, memory_bandwidth=1e30)
        assert model_axis_from(free, 64 * 64, 64) is None
    assert model_axis_from(replace(H100, on_chip=0), 64 * 64, 64) == 4864
    assert model_axis_from(replace(V5P, on_chip=0), 64 * 64, 64) == 7424


def test_what_does_not_fit_is_not_chosen():
    small = replace(H100, memory=1.0)
    assert best(1024, 64, 8, small) is None
    # States of [256, 4096, 16384] in 2 bytes are 34 GB, and there are three such arrays.
    assert best(16384, 4096, 1, H100) is None
    assert best(8192, 4096, 1, H100) is not None
    assert best(8192, 4096, 1, H100, bytes_per_number=4) is None
    row = scaling.scaling_table(H100, weak=False).rows[-1]
    assert row[:2] == ["16,384", "–"] and "100%" in row[2]
    with pytest.raises(ValueError, match="power of 2, got 6"):
        best(1024, 96, 6, H100)
    with pytest.raises(ValueError, match="divisible by the mesh, got 65/2"):
        update_cost(1024, 65, 2, 1, H100)


def test_the_report_has_all_sizes(capsys):
    assert scaling.main() == 0
    text = capsys.readouterr().out
    for hardware in (H100, V5P):
        assert text.count(f"**{hardware.name}: ") == 4
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        rows = [line.split("|")[1:-1] for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1
        assert all(cell.strip() for row in rows for cell in row)
    of_sizes = [table for table in tables if table.startswith("| H |")]
    assert len(of_sizes) == 6
    for table in of_sizes:
        assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
            f"| {H:,}" for H in arithmetic.SIZES
        ]


def test_the_readme_has_the_tables_as_they_are_printed():
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    printed, titles = scaling.report(), tuple(f"**{h.name}: " for h in (H100, V5P))
    parts = readme.split("\n\n")
    found = [n for n, part in enumerate(parts) if part.startswith(titles)]
    assert found or "benchmarks.scaling" not in readme
    for n in found:
        assert "\n\n".join(parts[n : n + 2]) in printed


def test_the_readme_says_what_is_computed():
    """What stands between the tables, each with its numbers."""
    readme = " ".join((pathlib.Path(__file__).parent.parent / "README.md").read_text().split())
    strong, sizes, weak = scaling.STRONG_BATCH, arithmetic.SIZES, scaling.WEAK_BATCH

    def split(H, hardware):
        """Milliseconds on 64 devices: over data alone, and as is best."""
        alone = update_cost(H, weak * 64, 64, 1, hardware)
        chosen = best(H, weak * 64, 64, hardware)
        assert chosen.model == 4
        return [number(cost.total * 1e3) for cost in (alone, chosen)]

    def boundary(hardware, B, devices, size=arithmetic.BYTES):
        return f"{model_axis_from(hardware, B, devices, size):,}"

    held = [
        update_cost(H, strong, 1, 1, H100, bytes_per_number=size).held / 1e9
        for H, size in ((16384, arithmetic.BYTES), (8192, arithmetic.FLOAT32))
    ]
    rows = [(hardware.on_chip / arithmetic.BYTES) ** 0.5 for hardware in (H100, V5P)]
    narrow = [H for H in sizes if H <= 4096]
    for hardware, widest in ((H100, 4096), (V5P, 8192)):
        for H in sizes:
            chosen = [best(H, weak * n, n, hardware) for n in scaling.DEVICES]
            assert all(cost.model == 1 for cost in chosen) == (H <= widest)
    faster = [best(H, strong, 64, H100).total / best(H, strong, 1024, H100).total for H in narrow]
    kept = [best(H, weak, 1, H100).total / best(H, weak * 1024, 1024, H100).total for H in narrow]
    no_cache = [replace(hardware, on_chip=0.0) for hardware in (H100, V5P)]
    late = replace(H100, start=H100.start + 1e-5)
    few = weak * 64, 64
    float32 = [boundary(hardware, *few, arithmetic.FLOAT32) for hardware in (H100, V5P)]
    many = [boundary(hardware, strong, 1024) for hardware in (*no_cache, late)]
    first, second, tpu = split(8192, H100), split(16384, H100), split(16384, V5P)
    for said in (
        f"with {strong:,} sequences on one device {held[0]:.0f} GB at H = 16,384, "
        f"and in float32 {held[1]:.0f} at 8,192",
        f"(beyond H = {rows[0]:,.0f} in 50 MB of an H100's L2, {rows[1]:,.0f} in 128 MiB",
        "**Up to H = 4,096 on an H100, 8,192 on a TPU v5p: data alone**",
        f"the same {strong:,} sequences gain {min(faster):.1f} to {max(faster):.1f} times on H100s",
        f"1,024 H100s keep {min(kept) * 100:.0f} to {max(kept) * 100:.0f} % of one's speed",
        f"H = 8,192 from {first[0]} to {first[1]} ms, of H = 16,384 from {second[0]} to "
        f"{second[1]}; on TPU v5p, of H = 16,384, from {tpu[0]} to {tpu[1]}.",
        f"at {float32[0]} (H100) and {float32[1]} (v5p)",
        "reads W from memory at every step, at "
        f"{boundary(no_cache[0], *few)} and {boundary(no_cache[1], *few)}; "
        f"if a collective takes 10 µs more than assumed, at {boundary(late, *few)} on an H100. "
        f"Of {strong:,} sequences on 1,024 devices, four on each, the last two lie at {many[0]} "
        f"and {many[1]}, and at {many[2]}.",
        f"Assumed for that are {H100.start * 1e6:.1f} µs and {H100.hop * 1e6:.1f} for each hop",
        f"links, which send {V5P.link_bandwidth / 1e9:.0f} GB/s each way",
    ):
        assert said in readme, said
