"""What is read from programs: operations, bytes and collectives, each loop as often as it runs."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from experiments.benchmarks import hlo
from experiments.benchmarks.chips import CHIPS, chip_of
from experiments.benchmarks.compiling import Report
from experiments.benchmarks.operations import operations
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.engine import memory

GIGABYTES = 1e9


def summing(n: int):
    """A program that needs about 8 n^2 bytes of scratch."""
    return (
        jax.jit(lambda x: jnp.sin(x[:, None] - x[None]) @ jnp.cos(x[:, None] + x[None]))
        .lower(jax.ShapeDtypeStruct((n,), jnp.float32))
        .compile()
    )


def test_a_round_that_needs_more_memory_than_is_free_warns_once(monkeypatch):
    program = summing(1000)
    needs = memory.peak_bytes(program) - 4000
    assert needs >= 4e6  # the product alone
    monkeypatch.setattr(memory, "free_bytes", lambda: needs - 1)
    told = rf"needs {needs / GIGABYTES:.3g} GB of memory, but .* GB are free.*smaller batches"
    with pytest.warns(UserWarning, match=told):
        memory.warn_of_shortage(program)
    memory.warn_of_shortage(program)
    monkeypatch.setattr(memory, "free_bytes", lambda: needs)
    memory.warn_of_shortage(summing(1000))


def test_free_memory_is_less_than_all():
    free = memory.free_bytes()
    assert free is None or 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# As libtpu writes it: a loop of five turns, each of which reads a slice of an array of all layers,
# gathers another and sums it up; in it one whose number of turns is an input.
TEXT = (pathlib.Path(__file__).parent / "golden" / "loop.hlo").read_text()


def test_loops_count_as_often_as_they_run():
    program = hlo.Program(TEXT, steps=3)
    whole, part = 4 * 8 * 4, 4 * 1 * 4
    assert program.collectives() == {
        "all-gather": hlo.Sent(5, 5 * whole),
        "all-reduce": hlo.Sent(5, 5 * whole),
    }
    assert program.gathered() == ["f32[8,4]{1,0:T(8,128)S(1)}"]
    # Of the layers a slice is read, into what is no main memory; so is what is gathered, which reads
    # its part; the sum is read from there and written; then three turns read and write. A counter that
    # is fused takes four bytes. What compares reads two counters, or one and a constant.
    sliced, summed, turns = 2 * 8 * 16, 2 * whole, 3 * 2 * whole
    tested = 5 * (4 + 4 + 1) + 3 * 5 * (4 + 4 + 1)
    counters = 5 * 4
    assert program.moved() == 5 * (sliced + part + summed + turns) + counters + tested


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0}", 12), ("(f32[4]{0}, s4[3]{0:T(8)S(1)})", 16 + 2), ("pred[]", 1),
        ("f8e4m3fn[7]", 7), ("token[]", 0), ("s32[<=5,2]", 40), ("c64[2]", 16),
    ],
)  # fmt: skip
def test_bytes_of_shapes(shape, size):
    assert hlo.nbytes(shape) == size


def test_what_lies_close_to_the_units_is_not_in_memory():
    assert hlo.in_memory("(f32[4]{0}, f32[8]{0:T(8)S(1)})") == 16


def test_a_program_of_this_machine_is_read_too():
    def repeated(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    arrays = np.ones((4, 32), np.float32), np.ones((6, 32, 32), np.float32)
    program = hlo.Program(jax.jit(repeated).lower(*arrays).compile().as_text())
    weights = arrays[1].nbytes
    assert weights <= program.moved() < 6 * weights  # a layer at a time, not all in each turn


def test_operations_are_those_of_products():
    a, b = np.ones((3, 8)), np.ones((8, 5))

    def looped(a, b, count):
        scanned = jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((3, 5)), length=4)[0]
        again = jax.lax.fori_loop(0, count, lambda _, c: c + jax.checkpoint(jnp.dot)(a, b), scanned)
        return jax.lax.cond(count > 1, lambda: again @ b.T, lambda: again @ b.T @ b @ b.T)

    once = 2 * 3 * 8 * 5
    found = operations(jax.make_jaxpr(looped)(a, b, 7), steps=7)
    assert found == (4 + 7 + 3) * once


def test_a_product_over_devices_counts_for_each():
    mesh = Mesh(np.array(jax.devices()[:1]), ("clients",))
    spec = PartitionSpec("clients")
    over = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    assert operations(jax.make_jaxpr(over(lambda x: x @ x.T))(np.ones((4, 6)))) == 2 * 4 * 6 * 4


def test_the_roofline_is_the_longer_of_both():
    chip = CHIPS["TPU v5 lite"]
    common = {"name": "x", "fits": True, "chip": chip, "compile_seconds": 1.0, "peak": 1.0}
    products = Report(**common, operations=197e12, moved=819e8, useful=98.5e12)
    assert (products.seconds, products.bound, products.mfu) == (1.0, "products", 0.5)
    memory = Report(**common, operations=197e11, moved=2 * 819e9, useful=197e11)
    assert (memory.seconds, memory.bound, memory.mfu) == (2.0, "memory", 0.05)


def test_an_unknown_chip_is_named():
    with pytest.raises(ConfigError, match="nothing is known of 'TPU v99'"):
        chip_of("TPU v99")
