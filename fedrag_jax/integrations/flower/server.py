"""The server of a federation: sends the model, waits for answers, and aggregates them.

It does not use Flower's `Strategy`, which cannot resume after a finished round, waits for all replies
at once and holds them in memory. Here a round equals the simulator's with the same answers, in the
order of clients. Answers wait in files, and a finished round is in a checkpoint before the next begins.
"""

import dataclasses
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import State
from fedrag_jax.federated.callbacks import Callback, FitState, ending
from fedrag_jax.federated.engine.client import all_finite
from fedrag_jax.federated.engine.cohort import Batches, steps_of
from fedrag_jax.federated.engine.records import require_finite, seen, summary
from fedrag_jax.federated.engine.start import started
from fedrag_jax.federated.engine.two_sides import member_of, server_step, share_of_sums
from fedrag_jax.federated.fit import FitResult
from fedrag_jax.integrations.flower.asking import Asking, RoundFailedError
from fedrag_jax.integrations.flower.broadcast import closed
from fedrag_jax.integrations.flower.draws import Draws
from fedrag_jax.integrations.flower.model_file import save_model
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.roll import Asked, Mail, Roll
from fedrag_jax.integrations.flower.wire import to_record
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.logs import JsonlLog, Progress

log = logging.getLogger("flwr")
NOTHING = Batches(0, np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))


def server_app(
    plan: Plan | Callable[[Context], Plan],
    folder: str | pathlib.Path,
    *,
    present: int | None = None,
    quorum: int | None = None,
    patience: float = 3600.0,
    callbacks: Iterable[Callback] | Callable[[Context], Iterable[Callback]] = (),
    search: Callable[[Grid, Context], None] | None = None,
) -> ServerApp:
    """Returns the Flower ServerApp of a federation.

        app = server_app(plan, "runs/federation")

    Args:
      plan: the plan, or a function that makes it from Flower's context.
      folder: folder of `checkpoints`, `rounds.jsonl` and `model.safetensors`. A server that restarts
        with the same folder continues after the last finished round.
      present: number of parties to wait for before the first round; by default all N. Later rounds
        use the parties that are connected.
      quorum: minimum number of answers in a round; with fewer, the missing parties are asked again. By
        default more than half of the sampled parties.
      patience: seconds to wait for parties at the start, and for the answers of a round.
      callbacks: as in `fit`; or a function that makes them from Flower's context.
      search: function that runs in place of training, if the run's configuration has a `search`.

    `folder`, `quorum` and `patience` of the run's configuration override the arguments, and are checked
    when the run starts.

    Raises:
      ConfigError: a count below 1, or patience that is not positive.
    """
    _require_counts(present, quorum, patience)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        if search is not None and config.get("search"):
            search(grid, context)
            return
        known = plan if isinstance(plan, Plan) else plan(context)
        where = pathlib.Path(str(config.get("folder", folder)))
        numbers: Any = [config.get(n, v) for n, v in (("quorum", quorum), ("patience", patience))]
        _require_counts(present, *numbers)
        told = callbacks(context) if callable(callbacks) else callbacks
        run_rounds(known, grid, where, present, *numbers, callbacks=told)

    return app


def _require_counts(present: Any, quorum: Any, patience: Any) -> None:
    counts = all(n is None or (type(n) is int and n >= 1) for n in (present, quorum))
    if not counts or type(patience) not in (int, float) or not patience > 0:
        raise ConfigError(
            "server_app: present and quorum must be at least 1 and patience above 0, got "
            f"{present!r}, {quorum!r} and {patience!r}"
        )


def run_rounds(
    plan: Plan,
    grid: Grid,
    folder: pathlib.Path,
    present: int | None = None,
    quorum: int | None = None,
    patience: float = 3600.0,
    callbacks: Iterable[Callback] = (),
    draws: Draws | None = None,
) -> FitResult:
    """Runs all remaining rounds; arguments as in `server_app`.

    Args:
      draws: random draws of the server; by default those that the algorithm needs.

    Returns:
      As `fit`. Records have `clients` (whose answers counted), `refused` ({client: reason}), and the
      traffic in sent bytes.

    Raises:
      RoundFailedError: too few parties connect, or fewer answer a round than its quorum.
      DivergenceError: the server's step gave a number that is not finite.
    """
    present = plan.clients if present is None else present
    draws = Draws.of(plan) if draws is None else draws
    draws.who(plan, np.ones(present, np.int64), 0)  # refuses an impossible sample
    mail, least = Mail(grid), present
    roll = Roll(plan, mail, patience)
    state = plan.initial._replace(population=())
    told = [Checkpointer(folder / "checkpoints"), JsonlLog(folder / "rounds.jsonl"), Progress()]
    told += callbacks
    with ending(told):
        first = FitState(0, state, None, (), plan.settings)
        now = started(first, plan.algorithm, told, plan.rounds)
        while now.round < plan.rounds and not any(callback.stopped for callback in told):
            began = time.perf_counter()
            roll.look()
            if not roll.wait(
                lambda count, least=least: count >= least and _drawable(plan, draws, count)
            ):
                raise RoundFailedError(
                    f"{len(roll.members)} of {least} parties connected within {patience:g} s: start "
                    "their SuperNodes, or set `present` or `patience`"
                )
            with tempfile.TemporaryDirectory(dir=folder) as spool:
                asking = Asking(plan, draws, mail, roll, now, pathlib.Path(spool))
                asking.until(quorum, patience)
                # Later rounds use the connected parties.
                least = min(quorum or present // 2 + 1, present)
                state, record = _closed(plan, draws, now, asking)
            record["seconds"] = record["device_seconds"] = time.perf_counter() - began
            now = dataclasses.replace(
                now, round=now.round + 1, state=state, history=(*now.history, record)
            )
            if any([callback.round_end(now, record) for callback in told]):  # all are told
                break
    save_model(plan, plan.handed_out(now.state), folder)
    _hand_on(plan, mail, roll, now, patience)
    frozen = plan.algorithm.frozen(now.state, plan.task.frozen)
    return FitResult(now.state.trainable, list(now.history), frozen)


def _closed(
    plan: Plan, draws: Draws, now: FitState, asking: Asking
) -> tuple[State, dict[str, Any]]:
    """Returns the state after a round, and its record."""
    work, clients = plan.algorithm.work, sorted(asking.answers)
    held = np.array([asking.held[c] for c in clients], np.int64)
    counts = held if work.weighting == "examples" else np.ones(len(clients))
    shared, numbers = plan.shared_round(now.round)
    frozen, key = jax.tree.map(jnp.asarray, plan.task.frozen), plan.key(now.round)
    start = asking.handed.start
    known = start._replace(population=plan.initial.population)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), asking.sums_like)
    finite: list[bool] = []
    for client, size, share in zip(clients, held, counts / max(counts.sum(), 1), strict=True):
        did = NOTHING._replace(steps=steps_of(int(size), work, plan.batch_size))
        member, sent = member_of(client, share, did), asking.arrays(client)
        mine = share_of_sums(shared, numbers, known, frozen, member, sent, key)
        finite.append(bool(all_finite(mine)))
        sums = jax.tree.map(jnp.add, sums, mine)
    after, well = server_step(shared, numbers, start, frozen, sums, draws.of_round(now.round))
    state = closed(plan, now.state, asking.handed, after)
    who = np.array(clients, int)
    require_finite(plan.task.name, now.round + 1, who, np.array(finite, bool), bool(well))

    report = _table([asking.answers[c] for c in clients])
    record = {"round": now.round + 1, "rounds": plan.rounds, **summary(who, report)}
    return state, record | {
        "drawn": len(asking.drawn),
        "present": len(asking.held),
        "refused": {str(client): why for client, why in asking.refused.items()},
        "examples": seen(now.history) + int(report["examples"].sum()),
        "bytes_down": sum(asking.down.values()),
        "bytes_up": sum(asking.up.values()),
        "traffic": {"down": asking.down, "up": asking.up},
        "refreshed": plan.task.retrieve is not None,
        "refresh_seconds": 0.0,
        "compile_seconds": 0.0,
        **plan.algorithm.record_fields(now.round + 1),
    }


def _table(reports: list[dict[str, float]]) -> dict[str, Any]:
    """Returns the parties' reports as columns, with the metrics that all of them have."""
    names = set.intersection(*map(set, reports)) if reports else {"loss", "examples"}
    columns = {name: np.array([report[name] for report in reports]) for name in sorted(names)}
    own = {"loss": columns.pop("loss"), "examples": columns.pop("examples")}
    return own | {"metrics": columns}


def _hand_on(plan: Plan, mail: Mail, roll: Roll, now: FitState, patience: float) -> None:
    """Sends the final model to all connected parties."""
    roll.look()
    order = {"round": now.round, "plan": plan.fingerprint}
    model = to_record(plan.handed_out(now.state))
    kept: list[int] = []
    content = RecordDict({"model": model, "order": ConfigRecord(order)})
    mail.send("query.keep", {m.node: content for m in roll.members.values()}, patience)

    def take(asked: Asked, message: Message) -> None:
        if asked.kind == "query.keep" and not message.has_error():
            kept.append(asked.node)

    def done() -> bool:
        return all(asked.kind != "query.keep" for asked in mail.waiting.values())

    mail.until(done, patience, take)
    log.info(
        "%d of %d parties received the model of round %d", len(kept), len(roll.members), now.round
    )


def _drawable(plan: Plan, draws: Draws, count: int) -> bool:
    """Returns whether a round can be sampled from this number of parties."""
    try:
        draws.who(plan, np.ones(count, np.int64), 0)
    except ConfigError:
        return False
    return True
