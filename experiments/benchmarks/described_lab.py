"""The lab of an experiment without weights, and the programs that it would run on other devices."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.lab import Lab
from experiments.loading import (
    clients_over,
    load_generator,
    load_retriever,
    pairs_of,
    replicates,
    strategies_of,
    trainable_strategies,
)
from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.federated.engine.placement import mesh_under
from fedrag_jax.federated.engine.round import Program, Round, trace_round
from fedrag_jax.federated.fit import fit
from fedrag_jax.generation import decoding
from fedrag_jax.generation.text import ROWS_ACCELERATOR
from fedrag_jax.models import hub
from fedrag_jax.models.fused import kernel_on
from fedrag_jax.models.hub import Pretrained
from fedrag_jax.models.shapes import put
from fedrag_jax.objectives.task import Task
from fedrag_jax.retrieval import embedding
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import parse
from fedrag_jax.strategies.strategy import Strategy


class TracedRound(NamedTuple):
    """A round to be compiled.

    Attributes:
      chips: that it is dealt out over.
      steps: local steps of a client.
      useful: operations by the formula of its objective, or None.
    """

    name: str
    traced: jax.stages.Traced
    chips: int
    steps: int
    useful: float | None


class DescribedLab(Lab):
    """A lab whose models are shapes, on devices that are only described.

    Args:
      devices: of a topology.

    Attributes:
      cut: over how many devices the generator's base is cut.
    """

    def __init__(self, config, dataset: Dataset, folder: pathlib.Path, devices: Sequence):
        self.devices = devices
        self.cut = config.models.devices
        super().__init__(config, dataset, folder)

    def load_models(self) -> dict[str, Pretrained]:
        """`generator` and `retriever`, described."""
        models, words = self.config.models, hub.load("builtin:decoder").tokenizer
        describe = functools.partial(hub.describe, tokenizer=words)
        clients = clients_over(self.config)
        generator = load_generator(models, clients, describe, self.devices)
        retriever = load_retriever(models, hub.describe)
        return {"generator": self._as_there(generator), "retriever": self._as_there(retriever)}

    def _as_there(self, model: Pretrained) -> Pretrained:
        """Returns the model with the attention of the described devices, not of this machine."""
        how = kernel_on(self.devices[0].platform)
        if model.network.config.attention != "auto" or how == kernel_on(jax.default_backend()):
            return model
        return dataclasses.replace(model, network=model.network.attending(how))

    # --- rounds ---------------------------------------------------------------------------------

    def rounds(self, prompt_tokens: int = 0) -> Iterator[TracedRound]:
        """Returns the rounds of the config's strategies in its regimes, each program once.

        Args:
          prompt_tokens: of the generator's prompts; 0 is what the data needs.
        """
        known: set[Program] = set()
        strategies = [named(s) for s in trainable_strategies(self.config, self.dataset)]
        for regime in self.config.regimes:
            if not pairs_of(self.config, regime):
                continue
            here = strategies_of(self.config, regime, [s.name for s in strategies])
            for strategy in (s for s in strategies if s.name in here):
                for task in self.tasks(strategy, prompt_tokens):
                    asked = self.asked_round(strategy, task, regime)
                    program, _ = Program.of(asked)
                    if program not in known:
                        known.add(program)
                        yield self._traced(regime, task, asked)

    def tasks(self, strategy: Strategy, prompt_tokens: int = 0) -> Iterator[Task]:
        """Yields the tasks of a strategy, each after a training that changed nothing."""
        tasks = strategy.tasks(self.system(self.config.seeds[0]), self.dataset)
        try:
            task = next(tasks)
            while True:
                wide = _widened(task.collate, prompt_tokens) if prompt_tokens else task.collate
                yield dataclasses.replace(task, collate=wide)
                task = tasks.send(task.trainable)
        except StopIteration:
            return

    def asked_round(self, strategy: Strategy, task: Task, regime: str) -> Round:
        """Returns the first round that `fit` requests when the experiment trains a task.

        Raises:
          ConfigError: a group size that would be measured.
        """
        if not self.config.training.group_size:
            raise ConfigError(
                "config.training.group_size is 0, which measures on the device: give how many clients "
                "are to be trained side by side on one"
            )
        seed, split = replicates(self.config)[0]
        client = self.members(regime)[0]

        def rate(name, part):
            return self.rate(regime, strategy, part, name)

        tuner = self.tuner(rate, regime, seed, split, client)
        arguments = tuner.arguments(task)
        mesh = self._clients_mesh(task, regime)
        rest = {"callbacks": (), "mesh": mesh, "time_aggregation": False}
        return next(fit.rounds(**arguments | rest))

    def _clients_mesh(self, task: Task, regime: str) -> Mesh:
        under, some = mesh_under(task.frozen), self.config.federated.devices or None
        if not regime.startswith("federated"):
            some = 1
        if under is not None:
            return under if "clients" in under.shape else None
        return Mesh(np.array(self.devices[:some]), ("clients",))

    def _traced(self, regime: str, task: Task, asked: Round) -> TracedRound:
        known = parse(regime, self.config.federated.alpha)
        budget = self.budget(known.converged)
        schedule, useful = budget.schedule(known.kind), None
        if task.declared.flops is not None:
            examples = schedule.drawn * schedule.local_steps * budget.batch_size
            one = task.table(self.dataset.train[:1])
            useful = float(examples * task.declared.flops(task, one))
        under = asked.mesh or mesh_under(asked.arguments)
        name = f"round {task.name}, {regime}"
        return TracedRound(name, trace_round(asked), under.size, schedule.local_steps, useful)

    # --- what runs between rounds, and after them -------------------------------------------------

    def embedding(self) -> jax.stages.Traced:
        """A batch of the longest passages."""
        retriever = self.models["retriever"]
        width = retriever.network.config.max_length
        return embedding.traced(retriever.network, retriever.params, width, self._alone)

    def prefill(self, prompt_tokens: int = 0) -> jax.stages.Traced:
        """A batch of prompts with all their passages."""
        shape = ROWS_ACCELERATOR, self._width(prompt_tokens)
        answer = self.config.models.max_answer_tokens
        return decoding.traced_prompts(*self._generator(), shape, answer, self._beside)

    def decode(self, prefill: jax.stages.Compiled, prompt_tokens: int = 0) -> jax.stages.Traced:
        """Tokens after those prompts, whose program says where it leaves what it read."""
        shapes = self.prefill(prompt_tokens).out_info[0]
        state = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            prefill.output_shardings[0],
        )
        return decoding.traced_tokens(*self._generator(), state, ROWS_ACCELERATOR, self._beside)

    def likelihoods(self, prompt_tokens: int = 0) -> jax.stages.Traced:
        """Traces the likelihoods of answers to validation or test questions."""
        system = self.system(self.config.seeds[0])
        some = self.dataset.test[:1]
        prompts = system.prompts.wide_enough_for(some)
        rows = np.arange(system.top_k)[None]
        table = prompts.training_table(some, rows, per_passage=False)
        if prompt_tokens:
            table = _wide(table, prompt_tokens)
        return evaluator.traced(*self._generator(), table, self._beside)

    def _generator(self):
        system = self.system(self.config.seeds[0])
        return system.decoder, system.generator.params, system.adapters

    def _width(self, prompt_tokens: int) -> int:
        system = self.system(self.config.seeds[0])
        return decoding.bucket(prompt_tokens or system.prompts.training_width(system.top_k))

    def _alone(self, tree):
        """Places a tree on the first device."""
        return _placed(tree, Mesh(np.array(self.devices[:1]), ("model",)))

    def _beside(self, tree):
        """Places a tree beside the generator's base, or on the first device."""
        under = mesh_under(self.models["generator"].params)
        return self._alone(tree) if under is None else _placed(tree, under)


def _placed(tree, mesh: Mesh):
    """Whole on every device; what has a place already keeps it."""
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x):
        there = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return x if there else put(x, whole)

    return jax.tree.map(placed, tree)


def _widened(collate, tokens: int):
    return lambda examples, retrieved: _wide(collate(examples, retrieved), tokens)


def _wide(table: dict, tokens: int) -> dict:
    """A table whose prompts are so wide: cut, or filled up."""
    return {
        name: np.resize(x, (*x.shape[:-1], tokens)) if name in ("tokens", "segments") else x
        for name, x in table.items()
    }
