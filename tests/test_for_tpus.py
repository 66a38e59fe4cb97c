"""Rounds compile for TPUs that are not here, and send no more than they should."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from experiments.benchmarks import hlo, topology
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.engine.round import Program, compile_round
from fedrag_jax.federated.fit import fit
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.models.sharding import shard
from fedrag_jax.objectives.generator import AnswerLoss
from fedrag_jax.objectives.joint import MarginalLoss
from fedrag_jax.objectives.task import Task

needs_libtpu = pytest.mark.skipif(
    not topology.has_libtpu(), reason="libtpu compiles for TPUs: pip install -e '.[tpu]'"
)
# Sizes that four chips divide; a kernel is larger than anything that clients have.
DECODER = lora.add_lora(
    Network.of(Decoder, DecoderConfig(256, 256, 512, 2, 8, 4, 32)),
    lora.LoraConfig(4, 8.0, ("q_proj", "down_proj")),
)
BASE = Network.of(Decoder, DECODER.config)
ENCODER = Network.of(Encoder, EncoderConfig(128, 64, 128, 2, 4, 32, max_length=32))
ROWS, CLIENTS, TOKENS, ANSWER, PASSAGES = 64, 16, 32, 4, 3
CORPUS = 96


def table(prompts: int):
    shape = ROWS, prompts
    return {
        "tokens": np.ones((*shape, TOKENS), np.int32),
        "lengths": np.full(shape, TOKENS, np.int32),
        "answer_positions": np.tile(
            np.arange(TOKENS - ANSWER, TOKENS, dtype=np.int32), (*shape, 1)
        ),
        "answer_mask": np.ones((ROWS, ANSWER), np.float32),
    }


def made(rows):
    return lambda examples, _: {name: column[examples] for name, column in rows.items()}


def generator_task(base):
    adapters = {"adapters": lora.init_adapters(DECODER, 0)}
    return Task("answers", adapters, {"decoder": base}, AnswerLoss(DECODER), made(table(1)))


def joint_task(base):
    asked = np.ones((ROWS, 16), np.int32)
    rows = table(PASSAGES) | {
        "retrieved": np.zeros((ROWS, PASSAGES), np.int32),
        "question_tokens": asked,
        "question_mask": asked.astype(bool),
    }
    trained = {"adapters": lora.init_adapters(DECODER, 0), "query": ENCODER.shapes()}
    frozen = {"decoder": base, "document_vectors": np.zeros((CORPUS, 64), np.float32)}
    return Task("joint", trained, frozen, MarginalLoss(DECODER, ENCODER), made(rows))


ROUNDS = {
    "fedavg": (generator_task, fed_avg(local_steps=2), {"optimizer": optax.adam(1e-3)}),
    "scaffold": (generator_task, scaffold(0.1, local_steps=2), {}),
    "flora": (
        generator_task,
        fed_lora("flora", DECODER, local_steps=2),
        {"optimizer": optax.adam(1e-3)},
    ),
    "joint": (joint_task, fed_avg(local_steps=2), {"optimizer": optax.adam(1e-3)}),
}


def asked_for(kind: str, mesh: Mesh):
    """The first round, as `fit` asks for it."""
    make, algorithm, options = ROUNDS[kind]
    base = BASE.shapes()
    task = make(shard(base, mesh) if "model" in mesh.shape else base)
    data = Partition(np.arange(ROWS), tuple(np.arange(ROWS).reshape(CLIENTS, -1)))
    return next(fit.rounds(task, data, algorithm, batch_size=2, mesh=mesh, **options))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut", "kind"),
    [
        (name, cut, kind)
        for name, most in (("v5e:2x4", 4), ("v5p:2x2x1", 2))
        for cut in (1, most)
        for kind in ROUNDS
    ],
)
def test_rounds_compile_for(name, cut, kind):
    devices = np.array(topology.devices_of(name))
    mesh = Mesh(devices, ("clients",))
    if cut > 1:
        mesh = Mesh(devices.reshape(-1, cut), ("clients", "model"))
    asked = asked_for(kind, mesh)
    program = compile_round(asked).func
    text = program.as_text()
    sent = hlo.Program(text, steps=2).collectives()
    assert sent["all-reduce"].count >= 1

    # Clients' data stays where it was dealt, and so does what of the base a chip holds.
    gathered = hlo.Program(text).gathered()
    if cut == 1:
        assert not gathered
        assert not {*sent} - {"all-reduce"}
    kernels = base_shapes()
    assert not [shape for shape in gathered if kernels & {*dimensions(shape)}]

    # What the round begins with makes room for what it ends with.
    state = jax.tree.leaves(asked.arguments[0])
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text, re.DOTALL).group(1)
    assert aliased.count("alias)") == len(state)

    # What is left is what the next round begins with, so that no round is compiled anew.
    after = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        program.out_info[0],
        program.output_shardings[0],
    )
    for before, left in zip(state, jax.tree.leaves(after), strict=True):
        assert (before.shape, before.dtype) == (left.shape, left.dtype)
        assert before.sharding.is_equivalent_to(left.sharding, len(before.shape))


def base_shapes() -> set[tuple[int, ...]]:
    """Of the base's matrices, all layers together and each by itself, sorted and without ones."""
    shapes = [x.shape for x in jax.tree.leaves(BASE.shapes()) if np.prod(x.shape) > 4096]
    parts = {sorted_dimensions(part) for shape in shapes for part in (shape, shape[1:])}
    return {part for part in parts if len(part) > 1}


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """Of the arrays of an HLO shape, sorted and without ones."""
    found = re.findall(r"\w+\[([\d,]*)\]", shape)
    return [sorted_dimensions(int(n) for n in some.split(",") if n) for some in found]


def sorted_dimensions(shape) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def test_a_described_model_has_the_program_of_the_loaded_one():
    loaded = BASE.init(jax.random.key(0))
    data = Partition(np.arange(ROWS), tuple(np.arange(ROWS).reshape(CLIENTS, -1)))
    one, other = (
        all_but_places(next(fit.rounds(generator_task(base), data, fed_avg(local_steps=2))))
        for base in (loaded, BASE.shapes())
    )
    assert one == other


def test_trainable_shapes_have_the_program_of_arrays():
    params = ENCODER.init(jax.random.key(0))
    found = []
    for query in (params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)):
        task = joint_task(BASE.shapes())
        task = dataclasses.replace(task, trainable=task.trainable | {"query": query})
        data = Partition(np.arange(ROWS), tuple(np.arange(ROWS).reshape(CLIENTS, -1)))
        asked = next(fit.rounds(task, data, fed_avg(local_steps=2)))
        found.append(all_but_places(asked))
    assert found[0] == found[1]


def all_but_places(asked) -> tuple:
    """Of the program of a round what makes it another one."""
    p, _ = Program.of(asked)
    leaves = [(x.shape, x.dtype, x.weak_type) for x in p.shapes]
    return p.loss, p.turn, p.fixed, p.structure, p.tree, leaves


@pytest.mark.skipif(topology.has_libtpu(), reason="libtpu is here")
def test_without_libtpu_the_extra_is_named():
    with pytest.raises(ConfigError, match=r"compiled by libtpu: .*pip install 'fedrag-jax\[tpu\]'"):
        topology.devices_of("v5e:2x4")


@needs_libtpu
@pytest.mark.parametrize("name", ["v9:2x4", "v5e:3x5", "v5e"])
def test_an_unknown_topology_is_named(name):
    with pytest.raises(ConfigError, match=f"libtpu has no '{name}' .* such as v5e:2x4"):
        topology.devices_of(name)
