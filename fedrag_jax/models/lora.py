"""Low-rank adapters (Hu et al. 2021, LoRA, arXiv 2106.09685): W + (alpha / rank) A B.

The base does not change and can be shared by many clients; only A and B are trained and sent, as a
small separate tree. B starts at zero, so a new adapter changes nothing.

The layers of a stack are one array, so adapters of different ranks use the width of the largest: unused
columns of A and rows of B are zero, get no gradient, and stay zero.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import Network, PerLayer, flatten, unflatten
from fedrag_jax.models.quantized import is_quantized


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The linear layers that get an adapter, and its size.

    Attributes:
      rank: columns of A, rows of B.
      alpha: the update is scaled by alpha / rank.
      targets: names of linear layers, such as "q_proj"; the same in every layer of the stack.
      patterns: `(regular expression, rank, alpha)` for layers of another size; the first full match of
        "layers.<number>.<name>", or of "<name>" outside the stack, is used.

    Raises:
      ConfigError: a rank below 1, no targets, or an invalid regular expression.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    patterns: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self):
        if not self.targets or isinstance(self.targets, str):
            raise ConfigError(f"lora.targets must name linear layers, got {self.targets!r}")
        # Tuples, because a network is looked up by its configuration.
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "patterns", tuple(map(tuple, self.patterns)))
        for rank in (self.rank, *(rank for _, rank, _ in self.patterns)):
            if rank < 1:
                raise ConfigError(f"lora.rank must be at least 1, got {rank}")
        for pattern, *_ in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"lora.patterns: {pattern!r} is not a regular expression: {error}"
                ) from error

    def sizes(self, name: str, layers: int | None) -> list[tuple[int, float]]:
        """Returns (rank, alpha) of a target in each of the layers, or outside the stack (None)."""
        places = [name] if layers is None else [f"layers.{i}.{name}" for i in range(layers)]
        usual = (".*", self.rank, self.alpha)
        return [
            next(size for pattern, *size in (*self.patterns, usual) if re.fullmatch(pattern, place))
            for place in places
        ]

    def widths(self, layers: int | None) -> dict[str, int]:
        """Returns the width of the array A of each target, over all layers or outside the stack
        (None)."""
        return {name: max(rank for rank, _ in self.sizes(name, layers)) for name in self.targets}

    def scaled(self, adapters: dict) -> dict:
        """Returns adapters of one model whose product A B is the update: every B is scaled by alpha /
        rank.

        Raises:
          ConfigError: adapters of many clients, stacked.
        """
        leaves = flatten(adapters)
        return unflatten((path, self._scaled(path, leaf)) for path, leaf in leaves)

    def _scaled(self, path, leaf):
        if path[-1] != "lora_b":
            return leaf
        stacked = path[0] == "layers"
        if isinstance(leaf, PerLayer):
            scales = self.scale(path, len(leaf.layers))
            pairs = zip(leaf.layers, scales, strict=True)
            return PerLayer(tuple(x * scale.astype(x.dtype) for x, scale in pairs))
        if leaf.ndim != 2 + stacked:
            raise ConfigError(
                f"adapters of a single model are needed, but {'.'.join(path)} has shape {leaf.shape}: "
                "take those of one client, or use jax.vmap"
            )
        return leaf * self.scale(path, leaf.shape[0]).astype(leaf.dtype)

    def scale(self, path: tuple, layers: int) -> np.ndarray:
        """Returns alpha / rank of the layers at a path, as a factor for arrays [L, ., .] or [., .]."""
        stacked = path[0] == "layers"
        sizes = self.sizes(path[-2], layers if stacked else None)
        scale = np.array([alpha / rank for rank, alpha in sizes])
        return scale.reshape((-1, 1, 1) if stacked else (1, 1))


def add_lora(network: Network, config: LoraConfig) -> Network:
    """Returns the network with adapters; the parameters of the base fit both networks.

    Raises:
      ConfigError: a target that is not a linear layer of the network or takes no adapter, or a pattern
        that matches none of its targets; the error lists the layers.
    """
    base = dataclasses.replace(network, lora=None)
    linear = {path[-2] for path, _ in flatten(base.shapes()) if path[-1] == "kernel"}
    everywhere = dataclasses.replace(network, lora=LoraConfig(targets=tuple(sorted(linear))))
    known = {path[-2] for path, _ in flatten(everywhere.shapes()) if path[-1] == "lora_a"}
    unknown = [name for name in config.targets if name not in known]
    if unknown:
        raise ConfigError(
            f"lora.targets {unknown} are not linear layers of this network that take adapters; it has "
            f"{sorted(known)}"
        )
    places = [
        f"layers.{i}.{path[-2]}" if path[0] == "layers" else path[-2]
        for path, leaf in flatten(base.shapes())
        if path[-1] == "kernel" and path[-2] in config.targets
        for i in range(leaf.shape[0] if path[0] == "layers" else 1)
    ]
    for pattern, *_ in config.patterns:
        if not any(re.fullmatch(pattern, place) for place in places):
            raise ConfigError(f"lora.patterns: {pattern!r} matches none of {places}")
    return dataclasses.replace(network, lora=config)


def init_adapters(network: Network, key: jax.Array | int) -> dict:
    """Creates new adapters: A uniform in ±1/sqrt(in) as in PEFT, B zero; float32.

    Returns:
      A tree like the parameters, with `lora_a` [L, in, r] and `lora_b` [L, r, out] for each targeted
      layer.

    Raises:
      ConfigError: the network has no adapters.
    """
    if network.lora is None:
        raise ConfigError("init_adapters needs a network with adapters: call add_lora first")
    rngs = nnx.Rngs(params=key)

    def fresh(path, shape):
        if path[-1] == "lora_b":
            return jnp.zeros(shape)
        bound = shape[-2] ** -0.5
        a = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        return a * _there(network.lora, path, shape)

    shapes = sorted((p, s.shape) for p, s in flatten(network.shapes()) if p[-1].startswith("lora_"))
    return unflatten((path, fresh(path, shape)) for path, shape in shapes)


def fitting(network: Network, adapters: dict) -> dict:
    """Returns adapters if they are of this network; those of N clients, stacked [N, ...], are too.

    Raises:
      ConfigError: a missing or unexpected matrix, or one of another shape.
    """
    wanted = {p: s.shape for p, s in flatten(network.shapes()) if p[-1].startswith("lora_")}
    given = {path: leaf.shape for path, leaf in flatten(adapters)}
    for path in sorted(wanted.keys() | given.keys()):
        here, there = wanted.get(path), given.get(path)
        if here is None or there is None or here not in (there, there[1:]):
            raise ConfigError(
                f"adapters: {'.'.join(path)} has shape {there}, and the network needs {here}: build it "
                "with the rank and targets (LoraConfig) of these adapters"
            )
    return adapters


def merge(network: Network, params: dict, adapters: dict) -> dict:
    """Returns the base's parameters with the adapters added: W + (alpha / rank) A B.

    Raises:
      ConfigError: the base is quantised.
    """
    return _added(network, params, adapters, jnp.add)


def unmerge(network: Network, merged: dict, adapters: dict) -> dict:
    """Reverts `merge`, up to rounding: W - (alpha / rank) A B."""
    return _added(network, merged, adapters, jnp.subtract)


def _added(network, params, adapters, add):
    if network.lora is None:
        raise ConfigError("merging needs the network the adapters belong to, from add_lora")
    if is_quantized(params):
        raise ConfigError("adapters cannot be merged into a quantised base; keep them separate")
    return add_product(params, product(network, adapters), add)


def product(network: Network, adapters: dict) -> dict:
    """Returns (alpha / rank) A B of every target, as a tree of kernels like those of the base.

    The rank in alpha / rank is the configured rank, whatever the number of columns of A.
    """
    factors = dict(flatten(network.lora.scaled(adapters)))
    return unflatten(
        ((*path[:-1], "kernel"), a @ factors[(*path[:-1], "lora_b")])
        for path, a in factors.items()
        if path[-1] == "lora_a"
    )


def add_product(params: dict, kernels: dict, add=jnp.add) -> dict:
    """Returns parameters with these kernels added, each in its own type."""
    result = dict(flatten(params))
    for path, update in flatten(kernels):
        result[path] = add(result[path], update).astype(result[path].dtype)
    return unflatten(result.items())


def adapted_kernels(params: dict, adapters: dict) -> dict:
    """Returns the kernels of the base that have adapters: everything that merging changes."""
    base = dict(flatten(params))
    places = {(*path[:-1], "kernel") for path, _ in flatten(adapters)}
    return unflatten((path, base[path]) for path in sorted(places))


def factorize(network: Network, kernels: dict, like: dict) -> dict:
    """Returns the adapters whose product is nearest to the kernels in the Frobenius norm (Eckart and
    Young 1936).

    With W = U S V^T, A is the first columns of U, and B the first rows of S V^T divided by alpha /
    rank. For a zero change, columns of A are orthonormal and rows of B are zero.

    Args:
      like: adapters that define shapes and types.
    """
    factors = {}
    for path, kernel in flatten(kernels):
        path_a, path_b = ((*path[:-1], name) for name in ("lora_a", "lora_b"))
        a, b = (dict(flatten(like))[p] for p in (path_a, path_b))
        each = kernel.reshape(-1, *kernel.shape[-2:])
        u, s, vt = (x.reshape(*kernel.shape[:-2], *x.shape[1:]) for x in jax.vmap(_svd)(each))
        rank, there = a.shape[-1], _there(network.lora, path_a, a.shape)
        scale = network.lora.scale(path_a, a.shape[0])
        weighted = s[..., None] * vt / scale
        factors[path_a] = (_columns(u, rank) * there).astype(a.dtype)
        weighted = _columns(weighted.swapaxes(-1, -2), rank) * there
        factors[path_b] = weighted.swapaxes(-1, -2).astype(b.dtype)
    return unflatten(factors.items())


@jax.custom_batching.sequential_vmap
def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # One after another: on a CPU a batch waits for threads of the pool that it runs in, so those of
    # several devices can wait for each other for ever (jaxlib 0.10).
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _columns(x: jax.Array, count: int) -> jax.Array:
    """Returns the first columns, padded with zeros if there are fewer."""
    x = x[..., :count]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count - x.shape[-1])])


def _there(config: LoraConfig, path: tuple, shape: tuple) -> np.ndarray:
    """Returns a mask of the columns that each layer has of a padded array A."""
    sizes = config.sizes(path[-2], shape[0] if path[0] == "layers" else None)
    there = (np.arange(shape[-1]) < np.array([[rank] for rank, _ in sizes])).astype(np.float32)
    return there[:, None] if path[0] == "layers" else there
