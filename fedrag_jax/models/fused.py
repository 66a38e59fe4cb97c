"""Attention by fused kernels, which store no T x T array (Dao et al., 2205.14135).

TPUs use the splash attention of JAX's Pallas kernels, GPUs use cuDNN through `jax.nn`; CPUs use the
plain implementation. Gradients are the kernels' own. `layers.attend` computes the same function with a
`Sight` in place of its mask, but by a kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError

ATTENTION = ("auto", "plain", "splash", "cudnn")
LEAST = 512  # tokens; for fewer, the T x T array is small
PADDING = -1
_BLOCKS = (512, 256, 128)  # tokens per block of a kernel; the largest that divides is used
_NARROW = jnp.bfloat16, jnp.float16


class Sight(NamedTuple):
    """An attention mask without a T x T array.

    Attributes:
      kernel: "splash" or "cudnn".
      texts: int32 [B, T], number of each token's text; a token attends only to its own text. `PADDING`
        marks padding.
      causal: whether a token attends to no later tokens.
      windows: the different window sizes of the layers in tokens, including the current one; 0 for no
        limit. Only for causal attention.
      which: index of this layer's window, int32 scalar.
    """

    kernel: str
    texts: jax.Array
    causal: bool
    windows: tuple[int, ...] = (0,)
    which: jax.Array | int = 0

    def at(self, places: jax.Array) -> jax.Array:
        """Returns the mask of the tokens at `places` int [B, M]: bool [B, M, T]."""
        t = self.texts.shape[1]
        own = jnp.take_along_axis(self.texts, places, axis=1)[:, :, None] == self.texts[:, None]
        own &= (self.texts != PADDING)[:, None]
        if not self.causal:
            return own
        back = places[:, :, None] - jnp.arange(t)[None, None]
        return own & (back >= 0) & (back < jnp.array([w or t for w in self.windows])[self.which])


def kernel_of(wanted: str, dtype, tokens: int, head_size: int, packed: bool = False) -> str | None:
    """Returns the name of the kernel for attention within rows; None for the plain implementation.

    Args:
      wanted: one of `ATTENTION`; "auto" chooses by the device.
      packed: whether several texts share a row.

    Raises:
      ConfigError: an unknown name.
    """
    if wanted not in ATTENTION:
        raise ConfigError(f"attention must be one of {[*ATTENTION]}, got {wanted!r}")
    if wanted == "auto":
        wanted = _kernel_here()
    narrow = dtype in _NARROW
    able = {
        "splash": narrow or dtype == jnp.float32,
        "cudnn": narrow and head_size % 8 == 0 and head_size <= 128 and not packed,
    }
    return wanted if tokens >= LEAST and able.get(wanted, False) else None


def kernel_on(platform: str) -> str:
    """Returns the implementation in `ATTENTION` for the devices of a platform, such as "tpu"."""
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "plain")


def _kernel_here() -> str:
    found = kernel_on(jax.default_backend())
    # cuDNN's attention needs Ampere or newer.
    old = found == "cudnn" and float(jax.devices()[0].compute_capability) < 8
    return "plain" if old else found


def sight(
    kernel: str, mask: jax.Array, segments=None, *, causal: bool, windows: Sequence[int] = ()
) -> Callable[[jax.Array | int], Sight]:
    """Returns the function of a layer's number that returns its `Sight`.

    Args:
      mask: bool [B, T], False for padding.
      segments: int [B, T], numbers of texts that share a row, from 0; None for one text per row.
      windows: the window of each layer; 0 for no limit. Empty if no layer has a limit.
    """
    t = mask.shape[1]
    texts = jnp.where(mask, 0 if segments is None else segments, PADDING).astype(jnp.int32)
    limits = [0 if w >= t else w for w in windows] or [0]
    kinds = tuple(sorted({*limits}))
    which = jnp.array([kinds.index(w) for w in limits])
    one = Sight(kernel, texts, causal, kinds)
    return lambda layer: one._replace(which=which[layer]) if len(kinds) > 1 else one


def mixed(q: jax.Array, k: jax.Array, v: jax.Array, seen: Sight) -> jax.Array:
    """Computes the attention of `layers.attend`; the output for padding tokens is undefined.

    Args:
      q: [B, T, H, E].
      k, v: [G, B, T, E].

    Returns:
      [B, T, H * E].
    """
    kernel = {"splash": by_splash, "cudnn": by_cudnn}[seen.kernel]
    found = kernel(q, k.transpose(1, 2, 0, 3), v.transpose(1, 2, 0, 3), seen)
    return found.reshape(*q.shape[:2], -1)


def by_splash(q, k, v, seen: Sight, interpret: bool = False) -> jax.Array:
    """Computes splash attention.

    Args:
      q: [B, T, H, E].
      k, v: [B, T, G, E].
      interpret: run on any device, slowly.

    Returns:
      [B, T, H, E].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    t, heads, size = q.shape[1:]
    width = t + -t % _BLOCKS[-1]

    def laid(x):  # heads before tokens, padded to whole blocks
        return jnp.pad(x, ((0, 0), (0, width - t), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    # Padding is a text of its own: a token that attends nowhere would get a NaN gradient.
    texts = jnp.pad(seen.texts, ((0, 0), (0, width - t)), constant_values=PADDING)

    def one(window, *arrays):
        run = _splash(width, heads, seen.causal, window, interpret)
        row = jax.vmap(lambda q, k, v, texts: run(q, k, v, SegmentIds(texts, texts)))
        return row(*arrays, texts)

    found = _switched(one, seen, laid(q * size**-0.5), laid(k), laid(v))
    return found.transpose(0, 2, 1, 3)[:, :t]


def _splash(tokens: int, heads: int, causal: bool, window: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = tokens, tokens
    if not causal:
        mask = splash.FullMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    block = next(size for size in _BLOCKS if tokens % size == 0)
    forward = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**forward, **dict.fromkeys(backward, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def by_cudnn(q, k, v, seen: Sight, implementation: str = "cudnn") -> jax.Array:
    """Computes cuDNN's attention of rows with one text each, padded on either side.

    Args:
      q: [B, T, H, E].
      k, v: [B, T, G, E].
      implementation: "cudnn", or "xla" for the same function on any device.

    Returns:
      [B, T, H, E].
    """
    real = seen.texts != PADDING
    t, first = real.shape[1], real.argmax(1)
    lengths = jnp.maximum(real.sum(1), 1).astype(jnp.int32)
    # It supports padding at the end only: rows are rotated until their padding is there, and back.
    turn = (jnp.arange(t)[None] + first[:, None]) % t
    back = (jnp.arange(t)[None] - first[:, None]) % t

    def turned(x, order):
        rows = jnp.arange(len(x))[:, None]
        return x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")

    def one(window, q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v,
            is_causal=seen.causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=(window - 1, 0) if window else None,
            implementation=implementation,
        )  # fmt: skip

    return turned(_switched(one, seen, *(turned(x, turn) for x in (q, k, v))), back)


def _switched(one: Callable, seen: Sight, *arrays):
    """Applies the kernel of the layer's window; each kernel is built for one window."""
    if len(seen.windows) == 1:
        return one(seen.windows[0], *arrays)
    made = [functools.partial(one, window) for window in seen.windows]
    return jax.lax.switch(seen.which, made, *arrays)
