"""Parties that come late, go, and come back during a run."""

from parties import federate, nodes, plan_of

from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.callbacks import Callback


def test_one_that_comes_late_takes_part_from_then_on(tmp_path):
    plan = plan_of()
    apps = nodes(plan, tmp_path, numbers=[0, 1, 3])
    late = nodes(plan, tmp_path, numbers=[2])

    class Comes(Callback):
        def round_end(self, state, record):
            apps.update(late)

    options = {"apps": apps, "present": 3, "callbacks": [Comes()]}
    result, _ = federate(plan, tmp_path, **options)
    # It is asked who it is while the second round goes on.
    assert [r["clients"] for r in result.history] == [[0, 1, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert [r["present"] for r in result.history] == [3, 3, 4]


def test_one_that_goes_is_left_out_and_may_come_back(tmp_path):
    plan = plan_of(scaffold(0.05, local_steps=3), rounds=4)
    apps = nodes(plan, tmp_path)
    gone = {}

    class Goes(Callback):
        def round_end(self, state, record):
            if state.round == 1:
                gone[102] = apps.pop(102)
            if state.round == 2:
                apps.update(gone)

    result, _ = federate(plan, tmp_path, apps=apps, callbacks=[Goes()])
    took_part = [record["clients"] for record in result.history]
    assert took_part[:2] == [[0, 1, 2, 3], [0, 1, 3]] and took_part[3] == [0, 1, 2, 3]


def test_one_that_comes_back_as_another_node_takes_part_when_the_first_is_gone(tmp_path):
    """A SuperLink lists a dead node until its heartbeat runs out; its number is taken until then."""
    plan = plan_of(rounds=4)
    apps = nodes(plan, tmp_path)

    class Moves(Callback):
        def round_end(self, state, record):
            if state.round == 1:
                apps[202] = apps[102]
            if state.round == 2:
                del apps[102]

    result, _ = federate(plan, tmp_path, apps=apps, callbacks=[Moves()])
    took_part = [record["clients"] for record in result.history]
    assert took_part == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
