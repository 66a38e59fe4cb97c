"""Layers of decoders and encoders. D hidden size, H heads, G key-value heads, E head size."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fedrag_jax.models import fused
from fedrag_jax.models.network import LINEAR, REMAT, PerLayer
from fedrag_jax.models.quantized import dense


def wide_type(x: jax.Array):
    """Returns the type for sums over an array: float32, or float64 for float64 arrays."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


class Linear(nnx.Module):
    """x [..., in] -> x W + b + x A B [..., out].

    A [in, r] and B [r, out], already scaled, exist if `lora` (a map from names to ranks) has the name.
    """

    def __init__(self, name, size_in, size_out, lora: dict[str, int], *, bias=False, rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size_in, size_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(size_out))
        if name in lora:
            self.lora_a = nnx.LoRAParam(jnp.zeros((size_in, lora[name])))
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora[name], size_out)))

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        """Computes in the type of x, or in `dtype` without rounding to a narrower type first."""
        # Rows of one matrix: XLA on CPU takes 2.5 times as long over the gradient of a 3-D product.
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.matmul(rows, dense(self.kernel[...]), preferred_element_type=dtype)
        if hasattr(self, "bias"):
            y = y + self.bias[...][None]
        if hasattr(self, "lora_a"):
            a, b = self.lora_a[...], self.lora_b[...]
            y = y + low_rank(rows.astype(a.dtype), a, b).astype(y.dtype)
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), LINEAR)


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x A B for rows x [N, in].

    The gradient is defined explicitly to fix the order of products: on a CPU, XLA takes seven times as
    long for a product with r columns as for its transpose with r rows, and swaps them otherwise.
    """
    return x @ a @ b


def _low_rank_forward(x, a, b):
    low = x @ a
    return low @ b, (x, a, b, low)


def _low_rank_backward(kept, dy):
    x, a, b, low = kept
    dlow = jax.lax.optimization_barrier(dy @ b.T)
    da = jax.lax.optimization_barrier(dlow.T @ x).T
    return dlow @ a.T, da, low.T @ dy


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Embed(nnx.Module):
    """A table of vectors [N, D]."""

    def __init__(self, count: int, size: int, *, rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, size)))

    def __call__(self, index: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], index, axis=0)


class RMSNorm(nnx.Module):
    """RMS norm (Zhang and Sennrich 2019, 1910.07467), computed in at least float32.

    If `centred`, it multiplies by 1 + scale before the result is narrowed (Gemma).
    """

    def __init__(self, size: int, epsilon: float, centred: bool = False):
        self.scale = nnx.Param(jnp.zeros(size) if centred else jnp.ones(size))
        self.epsilon, self.centred = epsilon, centred

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(wide_type(x))
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        if self.centred:
            return (wide * _along(1 + self.scale[...].astype(wide.dtype), wide)).astype(x.dtype)
        return wide.astype(x.dtype) * _along(self.scale[...], x)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016, 1607.06450), computed in at least float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale, self.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(wide_type(x))
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * _along(self.scale[...], x) + _along(self.bias[...], x)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes a vector [D] to the number of axes of x [..., D]."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | fused.Sight,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, query heads in groups over key-value heads (Ainslie et al., 2305.13245).

    Args:
      q: [B, T, H, E].
      k, v: [G, B, S, E], H a multiple of G.
      mask: bool [B, T or 1, S], True where a query may attend. A query that may attend nowhere gets the
        mean of the values (not NaN); its output is not used. A `Sight` instead of an array selects a
        fused kernel; then S = T.
      bias: [H, T, S], added to the scores; not supported with a `Sight`.

    Returns:
      [B, T, H * E].
    """
    if isinstance(mask, fused.Sight):
        return fused.mixed(q, k, v, mask)
    b, t, h, e = q.shape
    groups, _, s, _ = k.shape
    # Few axes, heads before tokens: on a CPU a quarter faster than [B, T, G, H / G, E], gradient
    # included. The heads that share keys stand one below the other. Heads come before rows, so that
    # those of one device stay together.
    q = (
        (q * e**-0.5)
        .reshape(b, t, groups, -1, e)
        .transpose(2, 0, 3, 1, 4)
        .reshape(groups * b, -1, e)
    )
    k, v = k.reshape(groups * b, s, e), v.reshape(groups * b, s, e)
    visible = jnp.tile(jnp.broadcast_to(mask, (b, t, s)), (groups, h // groups, 1))
    if bias is not None:
        bias = jnp.repeat(bias.reshape(groups, -1, s), b, axis=0)
    mixed = _mix(q, k, v, visible, bias)
    return mixed.reshape(groups, b, -1, t, e).transpose(1, 3, 0, 2, 4).reshape(b, t, h * e)


@jax.custom_vjp
def _mix(q, k, v, visible, bias):
    """Softmax attention of rows q [N, T, E] over k, v [N, S, E]; visible and bias [N, T, S].

    The gradient is defined explicitly: it needs half the passes over the scores, and uses the order of
    products that is fast in XLA on a CPU.
    """
    return _mix_forward(q, k, v, visible, bias)[0]


def _mix_forward(q, k, v, visible, bias):
    wide = wide_type(q)
    scores = jnp.einsum("nte,nse->nts", q, k, preferred_element_type=wide)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30)).astype(v.dtype)
    mixed = jnp.einsum("nts,nse->nte", weights, v)
    return mixed, (q, k, v, visible, bias, weights, mixed)


def _mix_backward(kept, dmixed):
    q, k, v, visible, bias, weights, mixed = kept
    wide = wide_type(v)
    dweights = jnp.einsum("nte,nse->nts", dmixed, v, preferred_element_type=wide)
    mean = (dmixed.astype(wide) * mixed.astype(wide)).sum(-1, keepdims=True)
    dscores = jnp.where(visible, weights.astype(wide) * (dweights - mean), 0)
    narrow = dscores.astype(q.dtype)
    dq = jnp.einsum("nts,nse->nte", narrow, k)
    # Few rows and many columns, then turned: the other order takes a third longer.
    dk = jax.lax.optimization_barrier(jnp.einsum("nte,nts->nes", q, narrow)).swapaxes(1, 2)
    dv = jax.lax.optimization_barrier(jnp.einsum("nte,nts->nes", dmixed, weights)).swapaxes(1, 2)
    dbias = None if bias is None else dscores.astype(bias.dtype)
    return dq, dk, dv, None, dbias


_mix.defvjp(_mix_forward, _mix_backward)


def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """Stacks `count` modules into one; each array has a leading axis."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def take_rows(x: jax.Array, places: jax.Array | None) -> jax.Array:
    """Returns x [B, T, ...] at `places` int [B, M] of the second axis, [B, M, ...]; x itself for
    None."""
    if places is None:
        return x
    index = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def looking_from(mask: jax.Array | fused.Sight, places: jax.Array | None):
    """Returns the mask of `attend` for the queries at `places`; None keeps all."""
    if places is not None and isinstance(mask, fused.Sight):
        return mask.at(places)
    return take_rows(mask, places)


def _apart(x) -> bool:
    return isinstance(x, PerLayer)


def run_stack(module: nnx.Module, step, carry, config, last=None):
    """Runs `carry, made = step(layer, carry, number)` over a stack's layers, in one compiled loop.

    `last` replaces the last step, if given. `config.remat`, one of `REMAT`, sets what the backward pass
    recomputes. `config.unroll` unrolls the layers; layers with `PerLayer` arrays are always unrolled.

    Returns:
      The last `carry`, and the outputs `made` of all layers, arrays with a leading axis.
    """
    graphdef, state = nnx.split(module)  # once, outside the loop
    numbers = jnp.arange(config.num_layers)
    if any(map(_apart, jax.tree.leaves(state, is_leaf=_apart))):
        each = []
        for number in range(config.num_layers):
            one = jax.tree.map(lambda x, i=number: x.layers[i], state, is_leaf=_apart)
            chosen = last if last is not None and number == config.num_layers - 1 else step
            carry, made = chosen(nnx.merge(graphdef, one), carry, number)
            each.append(made)
        return carry, jax.tree.map(lambda *made: jnp.stack(made), *each)

    def body(carry, xs):
        layer, number = xs
        return step(nnx.merge(graphdef, layer), carry, number)

    def at(number):
        return jax.tree.map(lambda x: x[number], state)

    def loop(body, xs):
        if policy := REMAT[config.remat]:
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, carry, xs, unroll=config.unroll)

    if last is None:
        return loop(body, (state, numbers))
    # Layers are looked up: a stack without its last layer would be a copy of all the others.
    carry, most = loop(lambda carry, number: body(carry, (at(number), number)), numbers[:-1])
    carry, made = last(nnx.merge(graphdef, at(numbers[-1])), carry, numbers[-1])
    return carry, jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), most, made)
