"""Run by test_mesh.py: clients over several devices, or over processes, give what one device gives.

on_a_mesh.py devices                  # where JAX sees eight
on_a_mesh.py decompositions           # where it sees two
on_a_mesh.py around                   # the same
on_a_mesh.py process <number> <port> <folder>  # one of two
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from toys import assert_close, assert_equal, leaves, make_examples, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.attacks import attacked, scaled_noise
from fedrag_jax.federated.compression.top_k import top_k
from fedrag_jax.federated.engine import round as round_module
from fedrag_jax.federated.engine import scheduling
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.krum import multi_krum
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.models import hub, lora
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.network import Network, flatten
from fedrag_jax.retrieval import embedding
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.logs import JsonlLog

DATA = Partition(  # eleven clients of 1 to 11 examples
    make_examples(66),
    tuple(np.split(np.arange(66), np.cumsum(np.arange(1, 11)))),
)
programs = []


def keep_programs():
    """Has `fit` leave its compiled rounds in `programs`."""
    make = round_module.compile_round

    def kept(*arguments):
        programs.append(make(*arguments))
        return programs[-1]

    round_module.compile_round = kept


def compare(mesh):
    work = {"local_epochs": 1, "sampling": uniform(9), "dropout": 0.1}
    adam, sgd = ({"optimizer": make(0.01)} for make in (optax.adam, optax.sgd))
    for x64, group_size, algorithm, settings in (
        (True, 1, fed_avg(carry_optimizer=True, **work), adam),
        (True, 2, scaffold(0.05, **work), {}),
        (False, 1, fed_avg(**work), sgd),
    ):
        with jax.enable_x64(x64):
            task = mlp_task(dropout=True)
            settings = {"rounds": 3, "batch_size": 4, "seed": 2} | settings
            one = fit(task, DATA, algorithm, **settings)
            programs.clear()
            compiled = round_module._compile.cache_info().misses
            many = fit(task, DATA, algorithm, mesh=mesh, group_size=group_size, **settings)
        update = np.abs(leaves(one.trainable) - leaves(task.trainable)).max()
        assert_close(many.trainable, one.trainable, 1e-9 if x64 else 1e-5 * update)
        for a, b in zip(many.history, one.history, strict=True):
            assert a["clients"] == b["clients"] and a["examples"] == b["examples"]
            np.testing.assert_allclose(a["client_loss"], b["client_loss"], rtol=1e-4)
        text = programs[0].func.as_text()
        assert "all-reduce" in text
        for other in ("all-gather", "all-to-all", "collective-permute"):
            assert other not in text, other
        assert (
            round_module._compile.cache_info().misses == compiled + 1
        )  # one program for all rounds


def compare_resumed(mesh, folder):
    """Every process saves into one folder, and logs for itself."""
    log = folder / f"{jax.process_index()}.jsonl"
    settings = {"optimizer": optax.sgd(0.05), "batch_size": 4, "mesh": mesh}
    whole = fit(mlp_task(), DATA, local_only(local_steps=2), rounds=3, **settings)
    for rounds in (2, 3):
        callbacks = [Checkpointer(folder / "checkpoints"), JsonlLog(log)]
        resumed = fit(
            mlp_task(),
            DATA,
            local_only(local_steps=2),
            rounds=rounds,
            callbacks=callbacks,
            **settings,
        )
    assert_equal(resumed.trainable, whole.trainable)
    lines = log.read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]


def compare_lora(mesh):
    """A base that takes in what the clients' adapters mean, and factors that stay with them."""
    from test_fed_lora import CLIENTS, NETWORK, SGD, after, chain_task
    from tiny import random_adapters

    task = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    for rule in ("fedex", "flexlora", "fedsa"):
        algorithm = fed_lora(rule, NETWORK, local_steps=3)
        one, many = (fit(task, CLIENTS, algorithm, rounds=2, mesh=m, **SGD) for m in (None, mesh))
        if rule != "fedsa":
            one, many = (after(task, result) for result in (one, many))
            one, many = ({".".join(p): x for p, x in d.items()} for d in (one, many))
        else:
            one, many = one.trainable, many.trainable
        assert_close(many, one, 1e-5)


def compare_around(mesh):
    """Compressed messages with what clients keep of them, every update at once, attacks."""
    work = {"local_epochs": 1, "sampling": uniform(9), "dropout": 0.1}
    settings = {"rounds": 3, "batch_size": 4, "seed": 2, "optimizer": optax.sgd(0.01)}
    with jax.enable_x64(True):
        for algorithm in (
            compressed(fed_avg(**work), up=top_k(0.2), down=top_k(0.5)),
            attacked(robust(multi_krum(2), **work), scaled_noise(5.0), (1, 4)),
        ):
            one, many = (fit(mlp_task(), DATA, algorithm, mesh=m, **settings) for m in (None, mesh))
            assert_close(many.trainable, one.trainable, 1e-6)
            for a, b in zip(many.history, one.history, strict=True):
                assert a["bytes_up"] == b["bytes_up"] and a.get("left_out") == b.get("left_out")


def compare_decompositions(mesh):
    """Kernels of many layers, decomposed by every device at once."""
    from tiny import ALL, TINY

    config = dataclasses.replace(TINY, hidden_size=96, num_layers=4, num_heads=16, num_kv_heads=16)
    network = lora.add_lora(Network.of(Decoder, config), lora.LoraConfig(4, 8.0, ALL[:4]))
    adapters = lora.init_adapters(network, 0)
    parts = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), (8, *x.shape)),
        lora.product(network, adapters),
    )

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("clients"), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    def nearest(parts):
        kernels = jax.tree.map(lambda x: jax.lax.psum(x.sum(0), "clients"), parts)
        return lora.product(network, lora.factorize(network, kernels, adapters))

    found = [jax.block_until_ready(nearest(parts)) for _ in range(10)]
    for (_, x), (_, kept) in zip(flatten(parts), flatten(found[-1]), strict=True):
        u, s, vt = np.linalg.svd(x.sum(0))
        best = u[..., :4] @ (s[..., :4, None] * vt[..., :4, :])
        np.testing.assert_allclose(kept, best, rtol=1e-3, atol=1e-3)


def compare_sweep():
    """Eleven fits dealt out over eight devices, one after the other on each, or all at once."""
    for way, data, algorithm in (
        (scheduling.Way(8, 1), DATA.examples, None),
        (scheduling.Way(8, 2), DATA, fed_avg(local_steps=2)),
    ):
        scheduling._ways = lambda count, way=way: [way]
        same = {"task": mlp_task(), "data": data, "algorithm": algorithm, "rounds": 2}
        fits = [same | {"seed": seed} for seed in range(11)]
        for arguments, found in zip(fits, sweep(fits), strict=True):
            assert_close(found.trainable, fit(**arguments).trainable, 1e-5)


def compare_shards(folder):
    """Each of two processes embeds every second shard of a corpus, and both have all vectors."""
    model = hub.load("builtin:encoder")
    texts = [f"Text {i} of some." for i in range(30)]
    how = {"max_length": 16}
    whole = embedding.embed_texts(model.network, model.params, model.tokenizer, texts, **how)
    embedded = []

    def counted(*args, **options):
        embedded.append(len(args[3]))
        return embed_texts(*args, **options)

    embed_texts, embedding.embed_texts = embedding.embed_texts, counted
    embedding.SHARD["cpu"] = 8
    parts = model.network, model.params, model.tokenizer, texts
    found = embedding.embed_corpus(*parts, cache_dir=folder / "vectors", **how)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert embedded == [[8, 8], [8, 6]][jax.process_index()]


if __name__ == "__main__":
    keep_programs()
    if sys.argv[1] == "process":
        number, port = map(int, sys.argv[2:4])
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
        assert (len(jax.devices()), len(jax.local_devices())) == (2, 1)
        mesh = jax.make_mesh((2,), ("clients",))
        compare(mesh)
        compare_resumed(mesh, pathlib.Path(sys.argv[4]))
        compare_shards(pathlib.Path(sys.argv[4]))
    elif sys.argv[1] == "around":
        compare_around(jax.make_mesh((2,), ("clients",)))
    elif sys.argv[1] == "decompositions":
        compare_decompositions(Mesh(np.array(jax.devices()), ("clients",)))
    else:
        assert len(jax.devices()) == 8
        mesh = jax.make_mesh((8,), ("clients",))
        compare(mesh)
        compare_lora(mesh)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FEDRAG_CACHE"] = folder  # where the fastest way is kept
            compare_sweep()
        # One client alone is nothing to deal out, and is not trained eight times over.
        alone = fit(mlp_task(), DATA.examples, mesh=mesh, rounds=1).trainable
        assert {len(x.devices()) for x in jax.tree.leaves(alone)} == {1}
    print("equal")
