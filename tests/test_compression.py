"""Compression: codecs against NumPy, messages counted, and algorithms over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import START, Keep, shares, steps
from test_fed_lora import CLIENTS, NETWORK, chain_task
from tiny import random_adapters
from toys import EXAMPLES, FOUR, assert_close, assert_equal, linear_task, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.by_name import Named, check
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.ditto import ditto
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.fed_opt import fed_adam
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.algorithms.secure import secure
from fedrag_jax.federated.compression.by_name import codec
from fedrag_jax.federated.compression.casting import cast
from fedrag_jax.federated.compression.codec import decoded, encoded, message_bytes
from fedrag_jax.federated.compression.quantisation import BLOCK, quantised, rotated
from fedrag_jax.federated.compression.top_k import top_k
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.tracking.checkpoints import Checkpointer

ALL = "float16", "bfloat16", "int8", "int4", "rotated_int8", "rotated_int4", "top_k:0.1"
TREE = {
    "adapters": {"a": np.random.default_rng(0).normal(size=(7, 11)), "b": np.arange(5.0)},
    "query": np.random.default_rng(1).normal(size=600),
}
TREE = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), TREE)


def sent(name, tree, seed=0):
    key = jax.random.key(seed)
    message = encoded(codec(name), tree, key)
    return message, decoded(codec(name), message, tree, key)


# --- codecs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_message(name):
    message, told = sent(name, TREE)
    assert jax.tree.map(jnp.shape, told) == jax.tree.map(jnp.shape, TREE)
    found = sum(np.asarray(x).nbytes for x in jax.tree.leaves(message))
    assert sum(message_bytes(codec(name), TREE).values()) == found
    values = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in TREE.items()}
    scales = sum(4 * -(-n // BLOCK) for n in values.values())
    expected = {
        "float16": 2 * 682,
        "bfloat16": 2 * 682,
        "int8": 682 + scales,
        "int4": 682 // 2 + scales,
        "rotated_int8": 2 * (1024 + 16),  # each part fills a block up
        "rotated_int4": 2 * (512 + 16),
        "top_k:0.1": 6 * (9 + 60),
    }
    assert found == expected[name]


@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros(name):
    _, told = sent(name, jax.tree.map(jnp.zeros_like, TREE))
    assert not any(np.any(x) for x in jax.tree.leaves(told))


def test_casting_rounds_and_does_not_overflow():
    vector = jnp.array([1e6, -1e6, 0.1, 1 / 3])
    told = cast("float16").decode(cast("float16").encode(vector, None), 4, None)
    expected = np.array([65504, -65504, np.float16(0.1), np.float16(1 / 3)], np.float32)
    np.testing.assert_array_equal(told, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_in_numpy(bits):
    vector = np.random.default_rng(2).normal(size=BLOCK + 45).astype(np.float32)
    key = jax.random.key(3)
    message = quantised(bits).encode(jnp.asarray(vector), key)
    u = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (2, BLOCK))).reshape(-1)
    levels = 127 if bits == 8 else 7
    told = np.asarray(quantised(bits).decode(message, vector.size, key))
    for start in (0, BLOCK):
        block = vector[start : start + BLOCK]
        scale = np.float32(np.abs(block).max() / levels)
        q = np.clip(np.floor(block / scale + u[start : start + block.size]), -levels, levels)
        np.testing.assert_allclose(told[start : start + BLOCK], scale * q, rtol=1e-6)
    assert message["values"].dtype == (jnp.int8 if bits == 8 else jnp.uint8)
    assert message["values"].size == (vector.size if bits == 8 else -(-vector.size // 2))


@pytest.mark.parametrize("make", [quantised, rotated])
def test_quantisation_is_right_on_average_and_never_off_by_more_than_a_step(make):
    vector = jnp.asarray(np.random.default_rng(4).normal(size=300), jnp.float32)
    found = make(4)

    def once(key):
        return found.decode(found.encode(vector, key), vector.size, key)

    told = np.asarray(jax.vmap(once)(jax.random.split(jax.random.key(0), 2000)))
    vector = np.asarray(vector)
    error = told - vector[None]
    # The standard error of a mean of 2,000, and five of them.
    assert np.all(np.abs(error.mean(0)) < 5 * error.std(0) / np.sqrt(2000) + 1e-6)
    if make is quantised:
        step = np.repeat(np.abs([vector[:256], np.pad(vector[256:], (0, 212))]).max(1) / 7, 256)
        assert np.all(np.abs(error) <= step[None, :300] + 1e-6)


def test_a_rotation_spreads_what_one_large_value_spoils():
    vector = np.random.default_rng(5).normal(size=1024).astype(np.float32)
    vector[7] = 300.0

    def error(found):
        key = jax.random.key(1)
        told = np.asarray(found.decode(found.encode(jnp.asarray(vector), key), 1024, key))
        return np.delete((told - vector) ** 2, 7)[:255].mean()  # in the block of the large one

    assert error(rotated(4)) < error(quantised(4)) / 3


def test_a_rotation_spreads_what_lies_along_a_row_of_the_matrix():
    """Without the random signs, a constant vector would become one large value."""
    noise = np.random.default_rng(6).normal(size=1024).astype(np.float32)

    def error(vector):
        key = jax.random.key(1)
        told = rotated(4).decode(rotated(4).encode(jnp.asarray(vector), key), 1024, key)
        return ((np.asarray(told) - vector) ** 2).mean()

    assert error(1 + 0.3 * noise) < 2 * error(noise)


def test_top_k_keeps_the_largest():
    vector = np.array([0.1, -3.0, 2.0, 0.0, -0.5], np.float32)
    message = top_k(0.4).encode(jnp.asarray(vector), None)
    np.testing.assert_array_equal(top_k(0.4).decode(message, 5, None), [0, -3, 2, 0, 0])
    assert message["places"].dtype == jnp.uint16
    assert len(top_k(0.41).encode(jnp.asarray(vector), None)["values"]) == 3


# --- algorithms over them ----------------------------------------------------------------------


def trained(algorithm, task=None, data=FOUR, **settings):
    settings = {"rounds": 3, "batch_size": 9} | settings
    optimizer = None if algorithm.optimizer is not None else optax.sgd(0.05)
    return fit(
        linear_task() if task is None else task, data, algorithm, optimizer=optimizer, **settings
    )


def flat(trainable):
    return np.append(trainable["w"], trainable["b"])


def test_top_k_with_error_feedback_in_numpy():
    """Two of four clients a round; each keeps what it left out until it is drawn again."""
    algorithm = compressed(fed_avg(local_steps=3, sampling=uniform(2)), up=top_k(0.3))
    keep = Keep()
    with jax.enable_x64(True):
        found = trained(algorithm, rounds=4, callbacks=[keep])
    x, left = START, np.zeros((4, 4))
    for record in keep.records:
        told = []
        for k in record["clients"]:
            whole = steps(x, FOUR.clients[k]) - x + left[k]
            seen = np.zeros(4)
            largest = np.argmax(np.abs(whole[:3]))  # one of three weights, and the bias
            seen[[largest, 3]] = whole[[largest, 3]]
            left[k] = whole - seen
            told.append(seen)
        p = shares()[record["clients"]]
        x = x + p / p.sum() @ told
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-6)
    kept = keep.state.population["compression"]
    np.testing.assert_allclose(kept["['w']"], left[:, :3], atol=1e-6)
    assert np.any(left)


def test_what_goes_down_is_compressed_too_and_its_errors_are_made_good():
    algorithm = compressed(fed_avg(local_steps=3), down=top_k(0.3))
    keep = Keep()
    with jax.enable_x64(True):
        found = trained(algorithm, rounds=4, callbacks=[keep])
    x = w = START
    for _ in range(4):
        gap = x - w
        told, largest = np.zeros(4), np.argmax(np.abs(gap[:3]))
        told[[largest, 3]] = gap[[largest, 3]]
        w = w + told
        x = x + shares() @ [steps(w, rows) - w for rows in FOUR.clients]
    np.testing.assert_allclose(flat(found.trainable), x, atol=1e-6)
    assert_close(keep.state.server["received"], {"w": w[:3], "b": w[3]}, 1e-6)


def test_clients_round_independently():
    """Errors of clients with the same update average out."""
    slope = np.random.default_rng(6).normal(size=2000)

    def loss(trainable, frozen, batch, rng):
        return (trainable["a"] * slope.astype(np.float32)).sum(), {}

    task = linear_task(trainable={"a": np.zeros(2000)}, loss=loss)
    algorithm = compressed(fed_avg(local_steps=1), up=quantised(4))
    of_one, of_eight = (
        trained(algorithm, task, Partition(EXAMPLES, rows), rounds=1)
        for rows in ((np.arange(1),), tuple(np.arange(8)[:, None]))
    )
    errors = [np.square(f.trainable["a"] + 0.05 * slope).mean() for f in (of_one, of_eight)]
    assert errors[1] == pytest.approx(errors[0] / 8, rel=0.2)


def test_all_of_top_k_is_no_compression():
    plain = trained(fed_avg(local_steps=3)).trainable
    both = compressed(fed_avg(local_steps=3), up=top_k(1.0), down=top_k(1.0))
    assert_close(trained(both).trainable, plain, 1e-5)
    assert compressed(fed_avg()) is fed_avg()


INNER = {
    "fed_avg": fed_avg(local_epochs=1, sampling=uniform(3), stragglers=0.5),
    "carried": fed_avg(local_epochs=1, sampling=uniform(3), carry_optimizer=True),
    "fed_adam": fed_adam(local_epochs=1, sampling=uniform(3)),
    "scaffold": scaffold(0.05, local_epochs=1, sampling=uniform(3)),
}


@pytest.mark.parametrize(
    ("inner", "up"),
    [
        ("scaffold", "top_k:0.2"),
        *(
            pytest.param(i, up, marks=pytest.mark.slow)
            for i in INNER
            for up in ("int4", "top_k:0.2")
        ),
    ],
)
def test_groups_agree_and_a_resumed_run_is_the_run(inner, up, tmp_path):
    algorithm = compressed(INNER[inner], up=codec(up), down=codec("int8"))
    settings = {"batch_size": 3, "seed": 4}
    with jax.enable_x64(True):
        whole = trained(algorithm, mlp_task(), rounds=3, **settings)
        wide = trained(algorithm, mlp_task(), rounds=3, group_size=3, **settings)
        trained(algorithm, mlp_task(), rounds=2, callbacks=[Checkpointer(tmp_path)], **settings)
        again = trained(algorithm, mlp_task(), callbacks=[Checkpointer(tmp_path)], **settings)
    assert_equal(again.trainable, whole.trainable)
    # A last digit may round to another level, which the next round sees.
    assert_close(wide.trainable, whole.trainable, 0.05)
    assert [r["clients"] for r in wide.history] == [r["clients"] for r in whole.history]


@pytest.mark.slow
def test_a_step_by_step_round_is_the_same_round():
    algorithm = compressed(fed_avg(local_steps=2), up=top_k(0.3), down=quantised(8))
    with jax.enable_x64(True):
        one = trained(algorithm, rounds=2).trainable
        other = trained(algorithm, rounds=2, debug=True).trainable
    assert_close(one, other, 1e-5)


def test_records_count_encoded_messages():
    plain = trained(fed_avg(local_steps=1, sampling=uniform(3)), mlp_task(), rounds=1)
    algorithm = compressed(fed_avg(local_steps=1, sampling=uniform(3)), up=quantised(4))
    (record,) = trained(algorithm, mlp_task(), rounds=1).history
    assert record["bytes_down"] == plain.history[0]["bytes_down"] == 3 * 20 * 4
    # 15 and 5 values: two in a byte, and a scale for each part.
    assert record["bytes_up"] == 3 * (8 + 4 + 3 + 4)
    assert record["traffic"]["up"]["in uint8"] == 3 * 8
    algorithm = compressed(scaffold(0.1, local_steps=1), up=quantised(8), down=cast("bfloat16"))
    (record,) = trained(algorithm, mlp_task(), rounds=1).history
    assert record["bytes_up"] == 4 * (20 + 8 + 80)  # control variates go as they are
    assert record["bytes_down"] == 4 * (40 + 80)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ffa", "rolora", "flora"])
def test_rules_for_adapters_send_encoded_factors(rule):
    task = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    plain = fit(task, CLIENTS, fed_lora(rule, NETWORK, local_steps=1), rounds=2, batch_size=2)
    algorithm = compressed(fed_lora(rule, NETWORK, local_steps=1), up=cast("float16"))
    found = fit(task, CLIENTS, algorithm, rounds=2, batch_size=2)
    assert_close(found.trainable, plain.trainable, 1e-3)
    for one, other in zip(found.history, plain.history, strict=True):
        assert one["bytes_up"] * 2 == other["bytes_up"]
    if rule == "flora":
        for settings in ({"up": top_k(0.1)}, {"down": quantised(8)}):
            with pytest.raises(ConfigError, match="creates new factors in each round"):
                compressed(fed_lora(rule, NETWORK), **settings)
    else:
        algorithm = compressed(
            fed_lora(rule, NETWORK, local_steps=1), up=top_k(0.5), down=top_k(0.9)
        )
        end = fit(task, CLIENTS, algorithm, rounds=2, batch_size=2)
        assert_close(end.trainable, plain.trainable, 0.05)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 1e-3, 1e-5])
def test_a_codec_is_found_by_its_own_name(fraction):
    assert codec(top_k(fraction).name) == top_k(fraction)


def test_it_is_chosen_by_name():
    named = Named("fedadam", {"up": "int4", "down": "bfloat16", "tau": 0.01})
    found = named.averaging(linear_task(), {})(local_steps=3)
    expected = compressed(fed_adam(tau=0.01, local_steps=3), up=quantised(4), down=cast("bfloat16"))
    assert found is expected
    assert found.name.startswith("compressed(fed_adam(") and "up=int4, down=bfloat16" in found.name
    grid = [compressed(scaffold(rate), up=quantised(8)).turns for rate in (0.1, 0.2)]
    assert grid[0] == grid[1]  # a grid of rates is one program


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: codec("int2"), r"no compression 'int2'; choose among \['bfloat16'"),
        (lambda: codec("top_k"), "no compression 'top_k'"),
        (lambda: codec("top_k:many"), "no compression 'top_k:many'"),
        (lambda: codec("top_k:0"), r"fraction must be in \(0, 1\], got 0"),
        (lambda: quantised(2), "bits must be 8 or 4, got 2"),
        (lambda: cast("float8"), "got 'float8'"),
        (
            lambda: check("flora", {"up": "top_k:0.1"}, "here"),
            "here: compressed: flora creates new",
        ),
        (lambda: check("flexlora", {"up": "int8", "ranks": (1, 2)}, "here"), "leave out ranks"),
        (lambda: check("fedex", {"secure": True}, "here"), "here: secure: fedex multiplies"),
        (lambda: compressed(local_only(), up=quantised(8)), "leaves a model with each client"),
        (lambda: compressed(centralised(), down=quantised(4)), "leaves a model with each client"),
        (lambda: compressed(ditto(), down=cast("bfloat16")), "leaves a model with each client"),
        (
            lambda: compressed(secure(fed_avg()), up=quantised(4)),
            "masked integers, .* leave out up",
        ),
        (
            lambda: compressed(fed_lora("flexlora", NETWORK, ranks=(1, 2)), up=quantised(8)),
            "messages of different sizes; leave out ranks",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
