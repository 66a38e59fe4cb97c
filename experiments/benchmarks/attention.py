"""Memory and roofline bounds of attention on a TPU, with a fused kernel and plain, without the TPU.

    pip install -e '.[tpu]'
    python -m experiments.benchmarks.attention
    python -m experiments.benchmarks.attention --topology=v5p:2x2x1 --tokens=8192 --heads=32 \
        --kv_heads=8

`libtpu` compiles one layer's causal attention in bfloat16, forward and backward, for one chip. Scratch
is memory beside arguments and results. The time is not measured: it is a lower bound, products at peak
rate or bytes at full bandwidth, whichever is longer. The count of products includes blocks that the
kernel's mask skips, and the bytes do not include blocks that it reads again. Prints a table, then one
line of JSON.
"""

import dataclasses
import json
import os

from absl import app, flags
from tabulate import tabulate

from experiments.benchmarks.topology import EXAMPLES, devices_of

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", f"topology of the chip, such as {EXAMPLES}")
_TOKENS = flags.DEFINE_list("tokens", ["1024", "4096"], "lengths of rows in tokens")
_ROWS = flags.DEFINE_integer("rows", 4, "number of rows", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 14, "number of query heads", lower_bound=1)
_GROUPS = flags.DEFINE_integer("kv_heads", 2, "number of key-value heads", lower_bound=1)
_SIZE = flags.DEFINE_integer("head_size", 64, "size of a head", lower_bound=1)


def main(argv):
    del argv
    os.environ["JAX_PLATFORMS"] = "cpu"  # where nothing is computed
    import jax

    from experiments.benchmarks.chips import chip_of
    from experiments.benchmarks.compiling import compiled

    jax.config.update("jax_enable_compilation_cache", False)
    device = devices_of(_TOPOLOGY.value)[0]
    chip, reports, rows = chip_of(device.device_kind), [], []
    for tokens in map(int, _TOKENS.value):
        for how in ("plain", "splash"):
            r, _ = compiled(f"{how}, {tokens} tokens", traced(how, tokens, device), chip, 1)
            rows.append((
                r.name, f"{r.scratch / 1e6:.1f}" if r.fits else f"{r.peak / 1e6:.0f}, does not fit",
                f"{r.operations / 1e9:.1f}", f"{r.moved / 1e6:.1f}", f"{1e3 * r.seconds:.3f}",
                r.bound, f"{r.compile_seconds:.0f}",
            ))  # fmt: skip
            reports.append(dataclasses.asdict(r) | {"ms_at_least": 1e3 * r.seconds})
    head = (
        "attention",
        "MB of scratch",
        "GFLOP",
        "MB moved",
        "ms at least",
        "bound by",
        "compiled in s",
    )
    print(tabulate(rows, head, disable_numparse=True))
    print(json.dumps({"device": device.device_kind, "rows": reports}))


def traced(how: str, tokens: int, device):
    """Returns the traced value and gradients, for shapes on a device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fedrag_jax.models import fused
    from fedrag_jax.models.layers import attend

    there = NamedSharding(Mesh(np.array([device]), ("model",)), PartitionSpec())
    rows, size = _ROWS.value, _SIZE.value

    def loss(q, k, v, mask):
        if how == "plain":
            back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None]
            seen = (back >= 0)[None] & mask[:, None]
        else:
            seen = fused.sight(how, mask, causal=True)(0)
        return jnp.square(attend(q, k, v, seen).astype(jnp.float32)).sum()

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=there)

    kept = shape(_GROUPS.value, rows, tokens, size)
    asked = shape(rows, tokens, _HEADS.value, size)
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return gradients.trace(asked, kept, kept, shape(rows, tokens, dtype=jnp.bool_))


if __name__ == "__main__":
    app.run(main)
