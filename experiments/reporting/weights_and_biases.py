"""A Weights & Biases run per strategy, regime and pair of seeds; offline it needs no account.

| section | holds |
|---|---|
| `<task>/` | curves of a task over rounds, as `fedrag_jax.tracking.weights_and_biases` names them |
| `test/` | scores of the test questions, with the unit in the name |
| `cost/` | what training took: seconds, bytes, operations |
| `controls/` | single numbers of a cell, in percent or counts |
"""

import pathlib
import re
import secrets
import sys
from collections.abc import Mapping
from typing import Any

from experiments.reporting.cells import Cell, seeds_name
from experiments.reporting.comparison import own_weight, scores
from fedrag_jax import files
from fedrag_jax.tracking.weights_and_biases import LOGGED, panels, quiet, require_key

# Units of scores that are no shares; shares are logged in percent. What attacks compare questions by
# is not logged: who holds them, whether they were read, similarities to single updates.
UNITS = {
    "nll": "nats", "searches": "per_question", "loss": "nats", "calibrated": "nats", "read": "nats",
    "closed": "nats", "ranked": "nats", "ratio": "sd",
}  # fmt: skip
NO_SCORES = re.compile("user|fresh|took_part|member|passage_there|(cosine|read)_[0-9]+")
_unanswered: set[str] = set()  # servers, by address, that this process has given up on


def log_cell(
    cell: Cell,
    folder: pathlib.Path,
    group: str,
    mode: str,
    project: str,
    config: dict,
    place: str = "",
    **about,
) -> None:
    """Logs curves and results of a finished cell as one run; repeated calls log it only once.

    If mode "online" finds no key or no server, it falls back to "offline" and prints a note; a later
    call uploads the rest. `folder/wandb.json` lists the logged cells. "disabled" does nothing.

    Args:
      place: folder of the cell below that of the run, such as `sign_flip/krum`; it distinguishes cells
        of one strategy and regime.
      about: settings that do, such as rank=8; used like `place` in name, tags and config.
    """
    if mode == "disabled":
        return
    tags = tags_of(cell, place, about)
    name = "-".join(tags)
    logged = files.kept(files.read_json, folder / LOGGED) or {}
    known = logged.get(name)
    if known and (known["sent"] or mode == "offline"):
        return
    how = {
        "dir": folder,
        "project": project,
        "group": group,
        "name": name,
        "job_type": cell.strategy,
        "tags": tags,
        "config": config
        | {"strategy": cell.strategy, "regime": cell.regime}
        | {"seed": cell.seed, "split": cell.split, "place": place}
        | about,
    }
    own = known["id"] if known else secrets.token_hex(4)
    sent = mode == "online" and _sent(cell, how | {"id": own})
    if not sent and not known:
        own = secrets.token_hex(4)  # a run that could not begin keeps its own
        _log(cell, how | {"id": own}, "offline")
    files.write_json(folder / LOGGED, logged | {name: {"id": own, "sent": sent}}, indent=1)


def tags_of(cell: Cell, place: str, about: Mapping[str, float]) -> list[str]:
    """Returns what distinguishes a cell from others of its run, in words."""
    others = [f"{name}={value:g}" for name, value in about.items()] or pathlib.Path(place).parts
    return [cell.strategy, cell.regime, *others, seeds_name(cell.seed, cell.split)]


def summary(cell: Cell) -> dict[str, Any]:
    """Returns scores, costs and controls of a cell by their names in Weights & Biases."""
    found: dict[str, Any] = {}
    for metric in cell.scores:
        if metric.startswith(own_weight("")) or NO_SCORES.fullmatch(metric):
            continue
        if (known := scores([cell], metric)).values.size:
            unit = UNITS.get(metric.rpartition("_")[2], "percent")
            factor = 100 if unit == "percent" else 1
            found[f"test/{metric}_{unit}"] = factor * float(known.means[0])
    cost = cell.cost._asdict() | {
        "bytes_up": cell.cost.bytes_up,
        "bytes_down": cell.cost.bytes_down,
    }
    cost["traffic_bytes"] = cost.pop("traffic")
    found |= {f"cost/{name}": value for name, value in cost.items() if value is not None}
    return found | {f"controls/{name}": value for name, value in cell.controls.items()}


def _sent(cell: Cell, how: dict[str, Any]) -> bool:
    """Whether the server has it; one that does not answer is asked no more by this process."""
    import wandb  # slow, and only here

    server = wandb.setup().settings.base_url
    if server in _unanswered:
        return False
    try:
        require_key()
        _log(cell, how, "online")
        return True
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        print(
            f"wandb: {server} cannot be reached ({why}): logging offline. The same command sends it "
            "later, and so does `wandb sync`",
            file=sys.stderr,
        )
        _unanswered.add(server)
        return False


def _log(cell: Cell, how: dict[str, Any], mode: str) -> None:
    import wandb

    settings = quiet(finish_timeout_raises=True)
    run = wandb.init(mode=mode, reinit="finish_previous", settings=settings, **how)
    run.define_metric("round", hidden=True)
    run.define_metric("*", step_metric="round")
    for task, rounds in cell.curves.items():
        for record in rounds:
            run.log(panels(task, record))
    run.summary.update(summary(cell))
    run.finish()
