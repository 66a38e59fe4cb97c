"""Turns a Flax module into pure functions of pytrees."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from fedrag_jax.errors import ConfigError

LINEAR = "linear"  # what a linear layer gives
# What the backward pass computes again of a layer (Korthikanti et al., 2205.05198): all of it; all but
# what its linear layers give, which takes most of the time; nothing.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "selective": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "none": None,
}
# Layers at most: each adds to the time that every program takes to be compiled, a loop does not.
WRITTEN_OUT = 12


@dataclasses.dataclass(frozen=True)
class Network:
    """`network(params, *inputs, adapters=None, method="__call__")`, pure and hashable.

    Attributes:
      module: the nnx.Module class, built as `module(config, lora, rngs=rngs)`.
      config: its frozen dataclass.
      lora: `LoraConfig` of the adapters, or None.
    """

    module: type[nnx.Module]
    config: Any
    lora: Any = None

    @classmethod
    def of(cls, module: type[nnx.Module], config) -> "Network":
        """Returns the network of a module class and its configuration, without adapters."""
        return cls(module, config)

    def __call__(self, params, *inputs, adapters=None, method: str = "__call__", **options):
        """Runs a method of the module; without `adapters` only the base is used.

        Raises:
          ConfigError: the trees do not have the leaves of the module.
        """
        scaled = self.lora.scaled(adapters) if self.lora and adapters else adapters
        arrays = params if adapters is None else _merged(params, scaled)
        graphdef, state = _abstract(self.module, self.config, self.lora if adapters else None)
        return getattr(nnx.merge(graphdef, _filled(state, arrays)), method)(*inputs, **options)

    def init(self, key: jax.Array) -> dict:
        """Creates parameters as nested dicts of float32 arrays; `lora.init_adapters` creates
        adapters."""

        @jax.jit
        def make(key):
            module = self.module(self.config, None, rngs=nnx.Rngs(params=key))
            return nnx.to_pure_dict(nnx.state(module))

        return make(key)

    def shapes(self) -> dict:
        """The parameter tree as `jax.ShapeDtypeStruct`s, adapters included."""
        return nnx.to_pure_dict(_abstract(self.module, self.config, self.lora)[1])

    def written_out(self, most: int = WRITTEN_OUT) -> "Network":
        """Returns the same function with unrolled layers that keep their outputs.

        This makes a step faster, but compilation slower with every layer: a network with more than
        `most` layers keeps the loop.
        """
        few = self.config.num_layers <= most
        how = {"unroll": True, "remat": "none"} if few else {"unroll": False}
        config = dataclasses.replace(self.config, **how)
        return dataclasses.replace(self, config=config)

    def recomputing(self, remat: str) -> "Network":
        """Returns the same function with another setting of what the backward pass recomputes
        (`REMAT`).

        Raises:
          ConfigError: an unknown setting.
        """
        if remat not in REMAT:
            raise ConfigError(f"remat must be one of {[*REMAT]}, got {remat!r}")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, remat=remat))

    def attending(self, how: str) -> "Network":
        """Returns the same function with another implementation of attention, one of
        `fused.ATTENTION`."""
        config = dataclasses.replace(self.config, attention=how)
        return dataclasses.replace(self, config=config)

    def unrolled(self) -> "Network":
        """Returns the same function with unrolled layers computed once, for the compiler's count."""
        config = dataclasses.replace(self.config, unroll=True, remat="none")
        return dataclasses.replace(self, config=config)


class PerLayer(NamedTuple):
    """Separate arrays of the layers instead of one stacked array [L, ...].

    XLA copies a layer of a stack before multiplying with it; for one token on a CPU, the copy takes
    twice as long as the product itself.
    """

    layers: tuple

    def replaced(self, number: int, one) -> "PerLayer":
        """Returns the arrays with that of one layer replaced."""
        return PerLayer((*self.layers[:number], one, *self.layers[number + 1 :]))


def per_layer(tree):
    """Converts a tree of arrays [L, ...], also quantised ones, to `PerLayer` arrays."""
    if isinstance(tree, dict):
        return {name: per_layer(value) for name, value in tree.items()}
    count = len(jax.tree.leaves(tree)[0])
    return PerLayer(tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)))


def flatten(tree: dict, path: tuple = ()):
    """Yields (path, leaf) for every leaf of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, name))
        else:
            yield (*path, name), value


def unflatten(leaves) -> dict:
    """Builds a nested dict from (path, leaf) pairs."""
    tree = {}
    for path, leaf in leaves:
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def _merged(base: dict, other: dict) -> dict:
    merged = dict(base)
    for name, value in other.items():
        inside = isinstance(value, dict) and name in base
        merged[name] = _merged(base[name], value) if inside else value
    return merged


@functools.lru_cache(maxsize=64)
def _abstract(module, config, lora):
    return nnx.split(nnx.eval_shape(lambda: module(config, lora, rngs=nnx.Rngs(0))))


def _filled(state: nnx.State, arrays) -> nnx.State:
    variables, given = dict(nnx.to_flat_state(state)), dict(flatten(arrays))
    if variables.keys() != given.keys():
        missing, unknown = variables.keys() - given.keys(), given.keys() - variables.keys()
        raise ConfigError(
            f"parameters do not fit the network: missing {sorted(map('.'.join, missing))}, "
            f"unknown {sorted(map('.'.join, unknown))}; adapters need a network from add_lora"
        )
    return nnx.from_flat_state({path: v.replace(given[path]) for path, v in variables.items()})
