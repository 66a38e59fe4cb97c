"""A frozen base in few bits: how wrong it may be, what still trains, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.generation.decoding import generate
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.models import hub, lora
from fedrag_jax.models.network import flatten
from fedrag_jax.models.quantized import FORMATS, dense, quantize

qwix = pytest.importorskip("qwix", reason="qwix is absent")

# The largest error over the largest weight of a block: half the widest gap between two values.
WORST = {"int8": 0.5 / 127.5, "int4": 0.5 / 7.5, "nf4": 0.5 * (1 - 0.6961928009986877)}
BITS = {"int8": 8, "int4": 4, "nf4": 4}
BLOCK = 32


@pytest.fixture(scope="module")
def model():
    return hub.load("builtin:decoder")


def made_dense(params):
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: hasattr(x, "qvalue"))
    return jax.tree.unflatten(tree, [jnp.asarray(dense(leaf)) for leaf in leaves])


def batch(rows=2, prompts=3, width=24, answer=4):
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 3000, (rows, prompts, width)).astype(np.int32),
        "lengths": np.full((rows, prompts), width, np.int32),
        "answer_positions": np.tile(np.arange(width - answer, width), (rows, prompts, 1)),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_no_weight_is_further_off_than_its_bits_allow(model, format):
    small = quantize(model.params, format, BLOCK)
    for (path, before), (_, leaf) in zip(flatten(model.params), flatten(small), strict=True):
        if path[0] != "layers" or path[-1] != "kernel":
            np.testing.assert_array_equal(leaf, before)
            continue
        blocks = np.asarray(before).reshape(before.shape[0], -1, BLOCK, before.shape[2])
        largest = np.abs(blocks).max(axis=2, keepdims=True)
        error = np.abs(np.asarray(dense(leaf)).reshape(blocks.shape) - blocks)
        assert (error <= WORST[format] * (1 + 1e-4) * largest).all()  # 0 where a block is 0
        assert error.max() > WORST[format] * largest.max() / 4
        assert leaf.qvalue.dtype.itemsize == 1
        assert jnp.iinfo(leaf.qvalue.dtype).bits == BITS[format]
        assert leaf.scale.shape == (*blocks.shape[:2], blocks.shape[3])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_are_dequantised_as_by_qwix(format, dtype):
    kernel = jax.random.normal(jax.random.key(0), (3, 4 * BLOCK, 24)).astype(dtype)
    small = quantize({"layers": {"q_proj": {"kernel": kernel}}}, format, BLOCK)
    packed = small["layers"]["q_proj"]["kernel"]
    layer = jax.tree.map(lambda x: x[1], packed)
    for some in (packed, layer):
        found, expected = dense(some), qwix.dequantize(some)
        assert found.dtype == expected.dtype == dtype
        np.testing.assert_array_equal(found, expected)
    assert len(np.unique(packed.qvalue.astype(jnp.int8))) >= 15, "all codes are compared"


def test_fewer_bits_are_further_off_and_nf4_fits_weights_better_than_int4(model):
    network, inputs = model.network, batch()
    tokens = inputs["tokens"].reshape(-1, 24)
    index, mask = np.broadcast_to(np.arange(24), tokens.shape), np.ones_like(tokens)
    exact = network(model.params, tokens, index, mask)

    def off(format):
        hidden = network(quantize(model.params, format, BLOCK), tokens, index, mask)
        return float(jnp.linalg.norm(hidden - exact) / jnp.linalg.norm(exact))

    assert off("int8") < 0.03 < off("nf4") < off("int4") < 0.5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on a CPU")
def test_choosing_nf4_values_writes_out_none_of_the_choices():
    kernels = {"layers": {"up": {"kernel": jnp.ones((4, 512, 2048), jnp.bfloat16)}}}
    kernels = quantize(kernels, "nf4", BLOCK)["layers"]["up"]["kernel"]

    def layer(x, layer):
        kernel, adapter = dense(layer[0]), layer[1]
        return jnp.tanh(x @ kernel + adapter) @ kernel.T, None

    def loss(adapters, kernels, x):
        return jax.lax.scan(jax.checkpoint(layer), x, (kernels, adapters))[0].sum()

    bfloat16 = jnp.bfloat16
    arguments = jnp.zeros((4, 1, 2048), bfloat16), kernels, jnp.ones((2, 512), bfloat16)
    memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512 * 2048 * 4  # written out they are 18


@pytest.mark.slow
def test_a_quantised_network_is_the_network_of_the_rounded_weights(model):
    network = lora.add_lora(model.network, lora.LoraConfig(4, 8.0))
    small = quantize(model.params, "nf4", BLOCK)
    adapters = jax.tree.map(lambda x: x + 0.05, lora.init_adapters(network, 0))
    rounded = made_dense(small)

    @jax.jit
    def loss(adapters, params):
        return answer_log_probs(network, params, adapters, batch()).mean()

    gradient = jax.jit(jax.grad(loss))
    for function in (loss, gradient):
        quantised, plain = function(adapters, small), function(adapters, rounded)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), quantised, plain
        )
    gradients = jax.tree.leaves(gradient(adapters, small))
    assert all(jnp.abs(g).max() > 0 for g in gradients)
    prompts = batch()["tokens"].reshape(-1, 24)
    written = [
        generate(network, params, prompts, np.ones_like(prompts), adapters=adapters).tokens
        for params in (small, rounded)
    ]
    np.testing.assert_array_equal(*written)


@pytest.mark.slow
def test_adapters_train_over_a_quantised_base_and_leave_it_alone(model):
    from fedrag_jax.data.partition import Partition
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.objectives.generator import AnswerLoss
    from fedrag_jax.objectives.task import Task

    network = lora.add_lora(model.network, lora.LoraConfig(4, 8.0))
    small = quantize(model.params, "int8", BLOCK)
    before = jax.tree.map(np.array, small)
    table = batch(rows=6, prompts=1) | {"answer_mask": np.ones((6, 4), np.float32)}
    task = Task(
        "quantised",
        {"adapters": lora.init_adapters(network, 0)},
        {"decoder": small},
        AnswerLoss(network),
        lambda examples, _: {name: column[examples] for name, column in table.items()},
    )
    clients = Partition(list(range(6)), (np.arange(3), np.arange(3, 6)))
    settings = {"rounds": 4, "batch_size": 3, "optimizer": optax.adamw(1e-2)}
    history = fit(task, clients, fed_avg(local_steps=4), **settings).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, small, before)


def test_what_cannot_be_done_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"format must be one of .* got 'int3'"):
        quantize(model.params, "int3")
    with pytest.raises(ConfigError, match=r"block 48 does not divide .*down_proj.kernel': 256"):
        quantize(model.params, "nf4", 48)
    small = quantize(model.params, "int8", BLOCK)
    with pytest.raises(ConfigError, match="are quantised; start from"):
        quantize(small)
    network = lora.add_lora(model.network, lora.LoraConfig())
    with pytest.raises(ConfigError, match="cannot be merged"):
        lora.merge(network, small, lora.init_adapters(network, 0))
    quantised = hub.Pretrained(model.network, small, model.tokenizer, "mine")
    with pytest.raises(CheckpointError, match=r"mine is quantised .* peft.save"):
        hub.save(quantised, tmp_path / "new")
    assert not (tmp_path / "new").exists()
