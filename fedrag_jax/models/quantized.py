"""A frozen base in 8 or 4 bits (Dettmers et al. 2023, QLoRA, arXiv 2305.14314), by Qwix.

Only the kernels of the layers are quantised, in blocks along the inputs with one scale each; norms,
biases, embeddings and the head are unchanged. A kernel is dequantised where it is used, one layer at a
time: gradients flow through it to the adapters below, but not into it.
"""

import functools

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError, missing
from fedrag_jax.models.network import flatten, unflatten

FORMATS = ("int8", "int4", "nf4")
# QLoRA, appendix E: spaced for normally distributed weights.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(params: dict, format: str = "nf4", block: int = 64) -> dict:
    """Quantises the kernels [L, in, out] of a network's parameters; `Network` runs on the result too.

    Args:
      format: "int8" or "int4", evenly spaced, or "nf4", spaced for normally distributed weights.
      block: number of inputs that share a scale, which has the dtype of the parameters.

    Raises:
      ConfigError: another format, parameters that are already quantised, or kernels whose inputs are
        not divisible by `block` (all reported at once).
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {FORMATS}, got {format!r}")
    if is_quantized(params):
        raise ConfigError("these parameters are quantised; start from those that were loaded")
    leaves = dict(flatten(params))
    kernels = [path for path in leaves if path[0] == "layers" and path[-1] == "kernel"]
    odd = {
        ".".join(path): leaves[path].shape[1] for path in kernels if leaves[path].shape[1] % block
    }
    if odd:
        raise ConfigError(
            f"block {block} does not divide the inputs of {odd}; give a block that does, or leave the "
            "base as it is"
        )
    return unflatten(
        (path, _quantized(leaf, format, block) if path in kernels else leaf)
        for path, leaf in leaves.items()
    )


def is_quantized(params: dict) -> bool:
    """Returns whether any parameter is quantised."""
    return any(map(_in_few_bits, dict(flatten(params)).values()))


def dense(kernel) -> jax.Array:
    """Returns a kernel, quantised or not, as a dense array."""
    if not _in_few_bits(kernel):
        return kernel
    scale, codes = kernel.scale, kernel.qvalue
    nf4 = kernel.qtype == "nf4"
    values = _nf4_values(codes, scale.dtype) if nf4 else codes.astype(scale.dtype)
    blocks = values.reshape(*scale.shape[:-1], -1, scale.shape[-1])
    return (blocks * scale[..., None, :]).reshape(values.shape)


def _nf4_values(codes: jax.Array, dtype) -> jax.Array:
    """Returns the values of codes 0 to 15, chosen bit by bit.

    Qwix looks them up in a flattened array, for which XLA gathers a kernel that is split over devices.
    """
    codes = codes.astype(jnp.int8)
    values = [jnp.full(codes.shape, value, dtype) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        # XLA on a CPU does not fuse jnp.where here, and would hold fifteen kernels in memory.
        values = [jax.lax.select(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(kernel, format, block):
    def one(layer):  # after another: nf4 looks at sixteen distances for each weight
        return _qwix().quantize(layer, format, channelwise_axes=(1,), tiled_axes={0: block})

    return jax.lax.map(one, kernel)


def _in_few_bits(leaf) -> bool:
    return hasattr(leaf, "qvalue")  # a qwix.QArray, which stays an extra


def _qwix():
    try:
        import qwix
    except ImportError as error:
        raise missing("quantised parameters need qwix", "quantized") from error
    return qwix
