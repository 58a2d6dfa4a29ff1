import dataclasses
import io
import os
import re

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxrnn
from jaxrnn import worked_example
from jaxrnn._app import example
from jaxrnn.worked_example import EPOCH_1, FIRST_UPDATE, GROUPS, OUTPUT_DELTAS, TOTALS, agreeing


@pytest.fixture(scope="module")
def comparisons():
    return worked_example.compare(worked_example.recovered_params())


@pytest.fixture(scope="module")
def losses():
    return worked_example.ensemble(members=8)


def console():
    return Console(width=80, file=io.StringIO())


def scaled(factor):
    return jax.tree.map(lambda leaf: factor * leaf, worked_example.recovered_params())


def test_every_number_agrees_from_the_recovered_start(comparisons):
    assert [c.name for c in comparisons if not c.agrees] == []
    counts = [agreeing(comparisons, group) for group in GROUPS]
    assert counts == [(68, 68), (16, 16), (20, 20), (3, 3)]


def test_eleven_numbers_miss_by_a_digit_from_the_printed_start():
    comparisons = worked_example.compare(worked_example.printed_params())
    assert agreeing(comparisons, FIRST_UPDATE) == (57, 68)
    for c in comparisons:
        assert abs(round(c.computed, 4) - c.printed) < 1.01e-4, c.name


def test_the_recovered_start_rounds_to_the_printed_one():
    recovered, printed = worked_example.recovered_params(), worked_example.printed_params()
    for ours, source in zip(jax.tree.leaves(recovered), jax.tree.leaves(printed), strict=True):
        assert ours.dtype == source.dtype == np.float64
        np.testing.assert_array_equal(np.round(ours, 4), source)


def test_the_totals_agree(comparisons):
    losses = worked_example.descend(worked_example.recovered_params(), 100)
    assert losses.shape == (101,)
    # Unrounded, epoch 0 is not what the source prints: it adds four rounded losses.
    assert [f"{losses[epoch]:.4f}" for epoch in (0, 1, 100)] == ["6.0337", "5.6922", "2.0603"]
    (epoch_0,) = [c for c in comparisons if "epoch 0" in c.name]
    assert (epoch_0.printed, epoch_0.group) == (6.0338, TOTALS)
    assert "rounded" in epoch_0.name and abs(epoch_0.computed - 6.0338) < 1e-12


def test_names_and_sections_are_those_of_the_source(comparisons):
    found = {(c.section, c.name): c for c in comparisons}
    assert len(found) == len(comparisons) == 107
    assert found["5.1", "h_1"].printed == 0.1432
    assert found["5.3", "Ω_3[2]"].printed == 0.1386
    assert found["6.1", "ŷ_4−y_4[4]"].group == OUTPUT_DELTAS
    assert found["6.2", "∂L/∂V[2]"].printed == -0.4356
    assert found["6.5", "U_new[4]"].printed == 1.1585
    assert found["6.7", "ŷ_2[3]"].group == EPOCH_1
    assert [c.section for c in comparisons] == sorted(c.section for c in comparisons)


def test_the_double_sum_agrees_too():
    params = worked_example.recovered_params()
    xs, targets = jaxrnn.Ids(np.array([0, 1, 2, 2])), np.array([1, 2, 2, 3])
    _, gradients = jaxrnn.textbook.loss_and_grads(params, xs, targets)
    for letter, printed in worked_example.PRINTED["updates"].items():
        layer = gradients.readout if letter in "Vc" else gradients.cell
        computed = np.ravel(getattr(layer, letter))
        # Adding 0 makes the -0 of an unused input 0.
        np.testing.assert_array_equal(np.round(computed, 4) + 0, printed["gradient"], letter)


def test_one_unit_of_the_last_digit_disagrees(comparisons):
    for c in comparisons:
        for wrong in (c.printed + 1e-4, c.printed - 1e-4):
            assert not dataclasses.replace(c, computed=wrong).agrees, c.name


def test_a_negative_zero_is_zero():
    assert worked_example.four_digits(-1e-9) == "0.0000"
    assert worked_example.four_digits(-0.61896) == "-0.6190"


@pytest.mark.parametrize("factor", [1.01, 0.999])
def test_a_scaled_start_loses_agreements_in_every_group(factor):
    comparisons = worked_example.compare(scaled(factor))
    for group in GROUPS:
        agree, total = agreeing(comparisons, group)
        assert agree < total, group


def test_a_wrong_gradient_loses_agreements(monkeypatch):
    def wrong(*args):
        loss, gradients = jaxrnn.loss_and_grads(*args)
        return loss, jax.tree.map(lambda leaf: 1.001 * leaf, gradients)

    monkeypatch.setattr(worked_example, "loss_and_grads", wrong)
    jax.clear_caches()
    comparisons = worked_example.compare(worked_example.recovered_params())
    jax.clear_caches()
    assert agreeing(comparisons, OUTPUT_DELTAS) == (16, 16)
    assert agreeing(comparisons, FIRST_UPDATE)[0] < 68
    assert agreeing(comparisons, TOTALS)[0] < 3


def test_starts_round_to_the_printed_one():
    starts, printed = worked_example.starts(1000), worked_example.printed_params()
    for drawn, source in zip(jax.tree.leaves(starts), jax.tree.leaves(printed), strict=True):
        assert drawn.shape == (1000, *source.shape)
        np.testing.assert_array_equal(np.round(drawn, 4), np.broadcast_to(source, drawn.shape))
    for layer, drawn in ((printed.cell.U, starts.cell.U), (printed.readout.V, starts.readout.V)):
        # Of 1,000 uniform draws the outermost miss the edge by 1 % with odds of e^-10.
        assert np.abs(drawn - layer).max(0).min() > 0.99 * 0.5e-4
    assert not starts.cell.b.any() and not starts.readout.c.any()
    assert not np.any(worked_example.starts(1000, seed=1).cell.U == starts.cell.U)


def test_members_are_single_runs(losses):
    assert losses.shape == (1001, 8) and losses.dtype == np.float64
    starts = worked_example.starts(8)
    for member in (0, 7):
        start = jax.tree.map(lambda leaf, m=member: leaf[m], starts)
        single = worked_example.descend(start, 60)
        # 60 updates of about 100 rounded operations each, which nothing amplifies yet.
        np.testing.assert_allclose(losses[:61, member], single, rtol=6000 * 2**-53)
    recovered = worked_example.descend(worked_example.recovered_params(), 60)
    # Starts differ by up to 1e-4 in nine parameters; each moves the loss by up to a few times that.
    assert np.abs(losses[:61] - recovered[:, None]).max() < 2e-3
    assert np.ptp(losses[:61], axis=1).min() > 0


def test_runs_part_at_about_epoch_650(losses):
    assert 640 < worked_example.parting_epoch(losses) < 670
    assert np.ptp(losses[-1]) > 0.1


def test_quantiles_fraction_and_parting_of_a_made_ensemble():
    # Members 0 to 100; they agree at epoch 0, differ by 0.01 at 1, and by 1 to 101 at the end.
    members = np.arange(101.0)
    losses = np.stack([0 * members, 0.0001 * members, members])
    assert worked_example.end_quantiles(losses) == {
        0.0: 0.0, 0.05: 5.0, 0.25: 25.0, 0.5: 50.0, 0.75: 75.0, 0.95: 95.0, 1.0: 100.0,
    }  # fmt: skip
    assert worked_example.fraction_below(losses) == 2 / 101
    assert worked_example.fraction_below(losses, 50.0) == 50 / 101
    assert worked_example.parting_epoch(losses) == 2
    assert worked_example.parting_epoch(losses, 0.009) == 1
    assert worked_example.parting_epoch(losses[:1]) is None


@pytest.mark.parametrize("x64", [False, True])
def test_the_precision_of_the_caller_is_unchanged(x64):
    with jax.enable_x64(x64):
        comparisons = worked_example.compare(worked_example.recovered_params())
        assert agreeing(comparisons, FIRST_UPDATE) == (68, 68)
        losses = worked_example.ensemble(members=2, epochs=1)
        assert losses.dtype == np.float64
        assert not np.array_equal(losses, losses.astype(np.float32))
        assert jax.config.jax_enable_x64 is x64
        assert jax.numpy.ones(()).dtype == ("float64" if x64 else "float32")


def test_the_report_shows_every_number(tmp_path, comparisons):
    shown, path = console(), tmp_path / "losses.png"
    assert example.report(shown, 8, path) is True
    text = shown.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "68 of 68 printed numbers agree at 4 digits" in text
    assert "16 of 16 output deltas, 20 of 20 of epoch 1, 3 of 3 totals" in text
    assert "57 of 68" in text
    assert "✓" in text and "✗" not in text and "…" not in text
    assert re.search(r"\d+% of them end below the printed 1\.3455\.", text)
    assert re.search(r"until epoch 6[456]\d, where they diverge", text)
    for c in comparisons:
        assert text.count(worked_example.four_digits(c.printed)) >= 2, c.name
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_of_runs_that_never_part():
    shown = console()
    example.print_ensemble(shown, np.full((1001, 3), 1.5))
    text = " ".join(shown.file.getvalue().split())
    assert "0% of them end below the printed 1.3455. They stay within 0.01 of each other." in text
    assert "1.3455, because training is chaotic there: it lies outside this spread" in text


@pytest.mark.parametrize("start", [scaled(1.01), worked_example.printed_params()])
def test_the_report_of_a_wrong_start_fails(start):
    shown = console()
    assert example.report(shown, 2, start=start) is False
    text = shown.file.getvalue()
    assert "✗" in text and "68 of 68" not in text


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, losses, monkeypatch):
    path = tmp_path / "losses.png"
    path.write_bytes(b"old")

    def fail(number):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"losses.png: cannot be written: disk full"):
        example.plot_ensemble(losses, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: worked_example.ensemble(0), "members: expected at least 1, got 0"),
        (lambda: worked_example.ensemble(2, 0), "epochs: expected at least 1, got 0"),
        (lambda: worked_example.ensemble(2, 1, -1), "seed: expected at least 0, got -1"),
        (lambda: worked_example.starts(2, 0.5), "seed: expected a whole number, got float"),
        (lambda: worked_example.compare(worked_example.starts(2)), "params.cell.U: expected"),
        (lambda: worked_example.compare(jaxrnn.init_params(jax.random.key(0), 4, 2, 4)),
         r"params.cell.U: expected shape \[1, 4\], got \[2, 4\]"),
        (lambda: worked_example.agreeing([], "all"), "group: expected one of 'first update'"),
        (lambda: worked_example.end_quantiles(np.zeros(3)), r"losses: expected shape \[epochs"),
        (lambda: worked_example.parting_epoch(np.zeros((2, 0))), "losses: expected"),
        (lambda: example.report(console(), 0), "members: expected at least 1, got 0"),
        (lambda: example.report(console(), 8, "no/such/folder/a.png"), "plot: expected a file"),
        (lambda: example.report(console(), 8, "."), "plot: expected a file"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
