"""Fused attention equals plain attention: padding, windows, grouped heads, gradients, clients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import topology
from fedrag_jax.errors import ConfigError
from fedrag_jax.models import fused, layers
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.network import Network

KERNELS = {  # run anywhere
    "splash": functools.partial(fused.by_splash, interpret=True),
    "cudnn": functools.partial(fused.by_cudnn, implementation="xla"),
}
TOKENS = 140  # more than a block, and no multiple
PLACES = np.arange(TOKENS)
# Padding nowhere, on the left, on the right, on both sides.
ENDS = ((0, 140), (61, 140), (0, 90), (9, 131))
MASK = np.stack([np.isin(PLACES, range(*ends)) for ends in ENDS])


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 16)
    monkeypatch.setattr(fused, "_BLOCKS", (128,))
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(fused, f"by_{name}", kernel)


def both(kernel, dtype, *, groups=1, causal=True, window=0, segments=None):
    """Outputs and gradients of the kernel and of the plain form, of tokens alone."""
    rows, heads, size = len(MASK), 2, 8
    shapes = [(rows, TOKENS, heads, size)] + 2 * [(groups, rows, TOKENS, size)]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    weights = rng.normal(size=(rows, TOKENS, heads * size)) * MASK[:, :, None]

    visible = np.broadcast_to(MASK[:, None], (rows, TOKENS, TOKENS))
    if causal:
        back = (PLACES[:, None] - PLACES[None])[None]
        visible = visible & (back >= 0) & (back < (window or TOKENS))
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])
    windows = (window,) if causal else ()

    def told(seen):
        def loss(*arrays):
            mixed = layers.attend(*arrays, seen)
            return (mixed.astype(jnp.float32) * weights).sum(), mixed * MASK[:, :, None]

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, mixed), gradients = run(*arrays)
        return mixed, *gradients

    seen = fused.sight(kernel, MASK, segments, causal=causal, windows=windows)(0)
    return told(seen), told(jnp.asarray(visible))


def assert_close(found, expected, limit):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=limit * np.abs(other).max(), rtol=0)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_look_back(kernel, window):
    assert_close(*both(kernel, jnp.float32, window=window), 1e-5)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_within_its_rounding(kernel):
    assert_close(*both(kernel, jnp.bfloat16), 2e-2)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_look_both_ways(kernel):
    assert_close(*both(kernel, jnp.float32, groups=2, causal=False), 1e-5)


@pytest.mark.usefixtures("anywhere")
def test_texts_that_share_a_row():
    texts = np.repeat([[1, 2, 3], [4, 4, 5]] * 2, [60, 30, 50], axis=1)
    assert_close(*both("splash", jnp.float32, segments=texts), 1e-5)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_padding_is_no_nan(kernel):
    x = jnp.ones((1, TOKENS, 1, 8))
    seen = fused.sight(kernel, np.zeros((1, TOKENS), bool), causal=True)(0)
    turned = x.transpose(2, 0, 1, 3)
    run = jax.jit(jax.grad(lambda q, k, v: layers.attend(q, k, v, seen).sum(), (0, 1, 2)))
    assert all(np.isfinite(x).all() for x in run(x, turned, turned))


DECODER = DecoderConfig(64, 16, 32, 3, 2, 1, 8, windows=(0, 20, 0))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_decoder_of_clients_side_by_side(kernel, monkeypatch):
    """Layers in a loop, some with a window, recomputed in the backward pass, each client with its own
    shift of the embeddings."""
    if kernel == "cudnn":
        monkeypatch.setattr(fused, "_NARROW", (jnp.float32,))
    network = Network.of(Decoder, DECODER)
    params, clients = network.init(jax.random.key(0)), jnp.arange(2.0)
    tokens = jax.random.randint(jax.random.key(1), (2, 70), 0, 64)
    mask = np.stack([np.arange(70) >= 11, np.arange(70) < 64])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    read = np.array([[30, 69, 11], [0, 63, 40]])

    def gradients(network):
        def loss(shift):
            table = {"embedding": params["embed"]["embedding"] * (1 + 0.1 * shift)}
            moved = params | {"embed": table}
            whole = network(moved, tokens, positions, mask)
            some = network(moved, tokens, positions, mask, read=read)
            return (whole * mask[:, :, None]).sum() + jnp.square(some).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(clients)

    found, expected = gradients(network.attending(kernel)), gradients(network.attending("plain"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.usefixtures("anywhere")
def test_prompts_are_read_and_continued():
    """A cache comes out of it that plain attention goes on with."""
    network = Network.of(Decoder, DECODER)
    params = network.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 64)
    mask = np.stack([np.arange(40) >= 11, np.arange(40) >= 0])
    positions = np.maximum(mask.cumsum(1) - 1, 0)

    def told(network):
        hidden, cache = network(params, tokens, positions, mask, room=48)
        more, _ = network(
            params, tokens[:, :1], positions[:, -1:] + 1, np.ones((2, 1), bool), cache=cache
        )
        return hidden * mask[:, :, None], more

    for one, other in zip(
        told(network.attending("splash")), told(network.attending("plain")), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.usefixtures("anywhere")
def test_an_encoder():
    network = Network.of(Encoder, EncoderConfig(64, 16, 32, 2, 2, 64, max_length=64))
    params = network.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 50), 0, 64)
    mask = np.stack([np.arange(50) < 31, np.arange(50) >= 0])
    found, expected = (network.attending(how)(params, tokens, mask) for how in ("splash", "plain"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "about", "kernel"),
    [
        ("auto", (jnp.bfloat16, 4096, 64), None),  # of a CPU
        ("plain", (jnp.bfloat16, 4096, 64), None),
        ("splash", (jnp.bfloat16, 511, 64), None),
        ("splash", (jnp.float32, 4096, 80), "splash"),
        ("splash", (jnp.float64, 4096, 64), None),
        ("cudnn", (jnp.bfloat16, 4096, 64), "cudnn"),
        ("cudnn", (jnp.float32, 4096, 64), None),
        ("cudnn", (jnp.bfloat16, 4096, 60), None),
        ("cudnn", (jnp.bfloat16, 4096, 256), None),
        ("cudnn", (jnp.bfloat16, 4096, 64, True), None),
    ],
)
def test_what_a_kernel_is_able_to(wanted, about, kernel):
    assert fused.kernel_of(wanted, *about) == kernel


def test_devices_have_their_kernel():
    assert [fused.kernel_on(p) for p in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "plain"]


def test_an_unknown_kernel_is_named():
    with pytest.raises(ConfigError, match=r"attention must be one of .* got 'flash'"):
        fused.kernel_of("flash", jnp.float32, 4096, 64)


@pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu compiles for TPUs")
@pytest.mark.slow
def test_long_rows_make_no_array_of_all_pairs_on_a_tpu():
    """Clients side by side, layers in a loop of which some have a window, both passes."""
    tokens, rows, clients = 4096, 1, 2
    devices = np.array(topology.devices_of("v5e:2x4")[:1])
    config = DecoderConfig(256, 256, 256, 2, 4, 2, 64, windows=(0, 1024))

    def compiled(how):
        network = Network.of(Decoder, config).attending(how)

        def loss(shift, params, inputs, mask):
            moved = params["embed"]["embedding"] * shift
            params = params | {"embed": {"embedding": moved}}
            positions = jnp.cumsum(mask, 1)
            hidden = network(params, inputs, positions, mask)
            return jnp.square(hidden.astype(jnp.float32)).sum()

        gradient = jax.vmap(jax.grad(loss), (0, None, 0, 0))
        whole = NamedSharding(Mesh(devices, ("clients",)), PartitionSpec())
        shapes = (
            jax.ShapeDtypeStruct((clients,), jnp.bfloat16),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), network.shapes()),
            *(jax.ShapeDtypeStruct((clients, rows, tokens), d) for d in (jnp.int32, jnp.bool_)),
        )
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
        )
        return jax.jit(gradient).trace(*placed).lower().compile()

    pairs = re.compile(rf"\[[\d,]*{tokens},{tokens}\]")
    by_kernel = compiled("splash")
    assert "tpu_custom_call" in by_kernel.as_text() and not pairs.search(by_kernel.as_text())
    plain = compiled("plain")
    assert pairs.search(plain.as_text())
    scratch = [x.memory_analysis().temp_size_in_bytes for x in (by_kernel, plain)]
    assert scratch[0] < scratch[1] / 4
