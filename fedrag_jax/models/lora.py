"""Low-rank adapters (Hu et al. 2021, LoRA, arXiv 2106.09685): W + (alpha / rank) A B.

The base stays as it is and may be shared by many clients; what is trained and sent are A and B, a
small tree of its own. B starts at zero, so a fresh adapter changes nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import Network, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linear layers get an adapter.

    Attributes:
      rank: columns of A, rows of B.
      alpha: the update is scaled by alpha / rank.
      targets: names of linear layers, such as "q_proj"; the same in every layer of the stack.

    Raises:
      ConfigError: a rank below 1, or no targets.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not self.targets or isinstance(self.targets, str):
            raise ConfigError(f"lora.targets must name linear layers, got {self.targets!r}")


def add_lora(network: Network, config: LoraConfig) -> Network:
    """The network that also takes adapters; the parameters of the base fit both.

    Raises:
      ConfigError: a target that is no linear layer of the network; lists those there are.
    """
    base = dataclasses.replace(network, lora=None)
    linear = {path[-2] for path, _ in flatten(base.shapes()) if path[-1] == "kernel"}
    unknown = [name for name in config.targets if name not in linear]
    if unknown:
        raise ConfigError(
            f"lora.targets {unknown} are no linear layers of this network; it has {sorted(linear)}"
        )
    return dataclasses.replace(network, lora=config)


def init_adapters(network: Network, key: jax.Array | int) -> dict:
    """Fresh adapters: A uniform in ±1/sqrt(in) as in PEFT, B zero; float32.

    Returns:
      a tree like that of the parameters, with `lora_a` [L, in, r] and `lora_b` [L, r, out] in the
      place of each targeted layer.

    Raises:
      ConfigError: the network takes no adapters.
    """
    if network.lora is None:
        raise ConfigError("init_adapters needs a network that takes adapters: call add_lora first")
    rngs = nnx.Rngs(params=key)

    def fresh(name, shape):
        if name == "lora_b":
            return jnp.zeros(shape)
        bound = shape[-2] ** -0.5
        return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

    shapes = sorted((p, s.shape) for p, s in flatten(network.shapes()) if p[-1].startswith("lora_"))
    return unflatten((path, fresh(path[-1], shape)) for path, shape in shapes)


def merge(network: Network, params: dict, adapters: dict) -> dict:
    """Parameters of the base with the adapters added in: W + (alpha / rank) A B."""
    scale = network.lora.alpha / network.lora.rank
    merged, low_rank = dict(flatten(params)), dict(flatten(adapters))
    for path in [path for path in low_rank if path[-1] == "lora_a"]:
        kernel, a, b = (*path[:-1], "kernel"), low_rank[path], low_rank[(*path[:-1], "lora_b")]
        update = scale * jnp.einsum("...ir,...ro->...io", a, b)
        merged[kernel] = (merged[kernel] + update).astype(merged[kernel].dtype)
    return unflatten(merged.items())
