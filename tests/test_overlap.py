"""What the host does for the next round, it does while the devices are busy with this one."""

import pytest
from toys import FOUR, assert_equal, linear_task

from fedrag_jax.federated import fit as fitting
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.engine.round import run_round
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import uniform

ALGORITHMS = {
    "fedavg": fed_avg(local_steps=2, sampling=uniform(2)),
    "scaffold": scaffold(0.1, local_steps=2, sampling=uniform(2)),
    "dropout": fed_avg(local_epochs=1, dropout=0.4, stragglers=0.5),
}
ROUNDS = 4


def ended(algorithm, change):
    """What a fit whose rounds are changed before they are run comes to."""
    asking = fit.rounds(linear_task(), FOUR, algorithm, rounds=ROUNDS, batch_size=2)
    asked = next(asking)
    while True:
        try:
            asked = asking.send(run_round(change(asked)))
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_the_same_to_the_last_bit(name):
    ahead = ended(ALGORITHMS[name], lambda asked: asked)
    after = ended(ALGORITHMS[name], lambda asked: asked._replace(meanwhile=None))
    assert_equal(ahead.trainable, after.trainable)
    for one, other in zip(ahead.history, after.history, strict=True):
        for what in ("loss", "clients", "client_loss", "drawn", "examples", "padding", "traffic"):
            assert one[what] == other[what]


def test_each_round_is_laid_out_once_and_before_the_one_before_it_is_over(monkeypatch):
    said, real = [], fitting.sample_cohort

    def told(data, work, round, *rest):
        said.append(f"laid out {round}")
        return real(data, work, round, *rest)

    def change(asked):
        if asked.meanwhile is None:
            return asked
        return asked._replace(meanwhile=lambda: said.append("busy") or asked.meanwhile())

    monkeypatch.setattr(fitting, "sample_cohort", told)
    ended(ALGORITHMS["fedavg"], change)
    assert said == ["laid out 0", *(s for r in range(1, ROUNDS) for s in ("busy", f"laid out {r}"))]
