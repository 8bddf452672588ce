"""The table holds what whole forward passes would say, for about half of their work."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from twla_jax.allocation import sensitivity
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.models import sharding, sites
from twla_jax.models.blocks import State, run
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace

from helpers.compiled import compiled_programs

WINDOWS = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)
CHOICES = (2, 4, 8)
# In another program a value halfway between two codes may go to the other one. The entries are a hundred times this.
TIES = 3e-5


@pytest.fixture(autouse=True)
def two_batches(monkeypatch):
    """The windows go through the model two at a time."""
    monkeypatch.setattr(sensitivity, "_CALL_TOKENS", 2 * len(CHOICES[:-1]) * 24)


def measure(model, kind, **options):
    return sensitivity.measure(model, WINDOWS, kind, CHOICES, progress=False, **options)


def loss_at(model, kind, bits):
    changed = sites.with_input_bits(model, sites.as_inputs(model, np.asarray(bits), kind))
    return evaluate(changed, WINDOWS, batch_size=2, progress=False)["nll"]


@pytest.mark.parametrize("kind", ["block", "input"])
def test_every_entry_is_that_of_whole_forward_passes(tiny_ternary, kind):
    table = measure(tiny_ternary, kind)
    length = len(table.costs)
    assert length == {"block": 3, "input": 12}[kind]
    base = np.full(length, 8)
    np.testing.assert_allclose(table.base_loss, loss_at(tiny_ternary, kind, base), rtol=1e-6)
    for site in range(length):
        for i, left in enumerate(CHOICES[:-1]):
            single = base.copy()
            single[site] = left
            rise = loss_at(tiny_ternary, kind, single) - table.base_loss
            np.testing.assert_allclose(table.costs[site, i], rise, atol=TIES)
            for j, right in enumerate(CHOICES[:-1]):
                if site + 1 < length:
                    pair = single.copy()
                    pair[site + 1] = right
                    joint = loss_at(tiny_ternary, kind, pair) - table.base_loss
                    alone = table.costs[site, i] + table.costs[site + 1, j]
                    np.testing.assert_allclose(table.interactions[site, i, j], joint - alone, atol=TIES)


def test_the_parts_of_a_block_are_the_block(tiny_ternary):
    x = jax.random.normal(jax.random.key(0), (2, 7, 42))
    block = jax.tree.map(lambda leaf: leaf[1], tiny_ternary.blocks)
    context, state = tiny_ternary.context(7).layer(1), State(x)
    for first, last in sites.site_spans(tiny_ternary, "input"):
        state = run(block, state, context, first, last)
    np.testing.assert_allclose(state.x, block(x, context), rtol=1e-5, atol=1e-6)


def test_blocks_before_a_changed_site_are_not_run_again(tiny_ternary):
    """Counted by what differs: each distinct beginning of the evaluations' bits is one block run, and no more."""
    effort = measure(tiny_ternary, "block").effort
    layers, lower = 3, CHOICES[:-1]
    evaluations = [(8,) * layers]
    for layer in range(layers):
        singles = [(8,) * layer + (bits,) + (8,) * (layers - layer - 1) for bits in lower]
        pairs = [
            (*s[: layer + 1], bits, *s[layer + 2 :]) for s in singles for bits in lower if layer + 1 < layers
        ]
        evaluations += singles + pairs
    beginnings = {bits[:length] for bits in evaluations for length in range(1, layers + 1)}
    assert effort["loss_evaluations"] == len(evaluations)
    assert effort["block_evaluations"] == len(beginnings)
    assert effort["naive_block_evaluations"] == len(evaluations) * layers


@pytest.mark.parametrize("kind", ["block", "input"])
def test_the_work_is_half_of_the_naive_beside_two_runs_of_the_model(tiny_ternary, kind):
    effort = measure(tiny_ternary, kind).effort
    assert effort["block_evaluations"] <= effort["naive_block_evaluations"] / 2 + 2 * 3


@pytest.mark.slow
def test_on_a_mesh_the_table_is_that_of_one_device(tiny_ternary):
    """Of three windows, which two devices cannot share alike."""
    mesh = sharding.make_mesh("data=2,model=2")
    one, split = (
        sensitivity.measure(tiny_ternary, WINDOWS[:3], "block", CHOICES, mesh=each, progress=False)
        for each in (None, mesh)
    )
    np.testing.assert_allclose(split.base_loss, one.base_loss, rtol=1e-6)
    np.testing.assert_allclose(split.costs, one.costs, atol=TIES)
    np.testing.assert_allclose(split.interactions, one.interactions, atol=TIES)
    assert split.effort["loss_evaluations"] == one.effort["loss_evaluations"]


def test_candidates_stay_on_the_devices_of_their_windows():
    over_windows = NamedSharding(sharding.make_mesh("data=4"), PartitionSpec(None, "data"))
    states = State(jax.device_put(np.arange(24.0).reshape(3, 4, 2, 1), over_windows))
    batch = sensitivity._window_by_window(states).x
    assert batch.sharding.spec[0] == "data"
    np.testing.assert_array_equal(batch.reshape(4, 3, 2), np.asarray(states.x)[..., 0].swapaxes(0, 1))


def test_all_layers_share_one_program(tiny_ternary):
    programs = (sensitivity._suffix, sensitivity._vary, sensitivity._advance)
    for program in programs:
        program.clear_cache()
    measure(tiny_ternary, "input")
    # one suffix; a site of each kind; the base past it, and candidates from each kind but the last to the block's end
    assert [compiled_programs(program) for program in programs] == [1, 4, 7]


@pytest.mark.parametrize("kind", ["block", "input"])
def test_an_interrupted_measurement_goes_on_to_the_same_table(tiny_ternary, kind, tmp_path, monkeypatch):
    whole = measure(tiny_ternary, kind)
    seen = []
    losses = sensitivity._losses

    def counted(*args):
        seen.append(1)
        return losses(*args)

    def interrupted(*args):
        if len(seen) == 4:  # in the second site, after one group of candidates of two batches in the first
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(sensitivity, "_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_ternary, kind, work_dir=tmp_path)
    monkeypatch.setattr(sensitivity, "_losses", counted)
    seen.clear()
    resumed = measure(tiny_ternary, kind, work_dir=tmp_path)
    np.testing.assert_array_equal(resumed.costs, whole.costs)
    np.testing.assert_array_equal(resumed.interactions, whole.interactions)
    assert resumed.base_loss == whole.base_loss
    # What is run a second time does not count, so that the report is that of a run without an interrupt.
    counts = ("loss_evaluations", "block_evaluations", "naive_block_evaluations")
    assert [resumed.effort[each] for each in counts] == [whole.effort[each] for each in counts]
    # Three groups of candidates a site, but not those of the first again; and at the end the base.
    assert len(seen) == 2 * (3 * (len(whole.costs) - 1) + 1)
    seen.clear()
    measure(tiny_ternary, kind, work_dir=tmp_path)
    assert len(seen) == 2  # the base alone


def test_clips_and_weights_make_another_table_and_bits_do_not(tiny_ternary):
    identity = sensitivity.fingerprint(tiny_ternary, WINDOWS, "input", CHOICES)

    def other(model=tiny_ternary, windows=WINDOWS, kind="input", choices=CHOICES):
        return sensitivity.fingerprint(model, windows, kind, choices)

    assert other(sites.with_input_bits(tiny_ternary, np.full((3, 4), 2))) == identity
    clips = {site.name: np.full((3, 4), 0.5) for site in tiny_ternary.sites}
    assert other(sites.with_input_clips(tiny_ternary, clips)) != identity
    assert other(windows=WINDOWS[:2]) != identity
    assert other(kind="block") != identity
    assert other(choices=(2, 8)) != identity
    tiny_ternary.embed = nnx.Param(tiny_ternary.embed.get_value() * 2)
    assert other() != identity


def test_a_model_in_full_precision_has_no_table(tiny_config):
    with pytest.raises(TwlaError, match="need a quantised model"):
        measure(Decoder(tiny_config, rngs=nnx.Rngs(0)), "input")


def test_a_site_weighs_what_its_inputs_or_their_linears_do(tiny_config, tiny_ternary):
    for model in (tiny_ternary, nnx.eval_shape(lambda: Decoder(tiny_config, rngs=nnx.Rngs(0)))):
        assert sites.site_weights(model, "input", "elements").tolist() == [42, 42, 42, 78] * 3
        assert sites.site_weights(model, "block", "elements").tolist() == [204] * 3
        macs = [42 * (42 + 14 + 14), 42 * 42, 42 * 78 * 2, 78 * 42]
        assert sites.site_weights(model, "input", "macs").tolist() == macs * 3
        assert sites.work_shares(model, 24).sum() == pytest.approx(1)


def test_bits_are_those_of_every_input_and_off_is_16(tiny_ternary):
    bits = np.arange(12).reshape(3, 4) % 4 * 2 + 2
    changed = sites.with_input_bits(tiny_ternary, bits)
    np.testing.assert_array_equal(sites.input_bits(changed), bits)
    assert not np.array_equal(sites.input_bits(tiny_ternary), bits)
    activation = tiny_ternary.blocks.o_input.activation.get_value()
    off = dataclasses.replace(activation, enabled=False)
    changed = replace(changed, {"blocks.o_input.activation": off})
    np.testing.assert_array_equal(sites.input_bits(changed)[:, 1], [16, 16, 16])
