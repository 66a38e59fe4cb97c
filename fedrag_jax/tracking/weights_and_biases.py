"""A Weights & Biases run per strategy, setting and pair of seeds; offline it needs no account."""

import os
import pathlib

import numpy as np

from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.tracking.cells import Cell, seeds_name


def log_cell(
    cell: Cell, folder: pathlib.Path, group: str, mode: str, project: str, config: dict, **about
):
    """Curves and results of a finished cell as one run.

    `about` tells cells of one strategy and setting apart, such as rank=8: in name, tags and config.
    Without a key, mode "online" falls back to "offline" and says so; "disabled" writes nothing.
    """
    if mode == "disabled":
        return
    import wandb  # slow, and only here

    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        print("wandb: no API key found, logging offline; send it later with `wandb sync`")
        mode = "offline"
    seeds = {"seed": cell.seed, "split": cell.split}
    others = [f"{name}={value:g}" for name, value in about.items()]
    run = wandb.init(
        dir=folder,
        project=project,
        group=group,
        name="-".join([cell.strategy, cell.setting, *others, seeds_name(**seeds)]),
        job_type=cell.strategy,
        tags=[cell.strategy, cell.setting, *others, seeds_name(**seeds)],
        config=config | {"strategy": cell.strategy, "setting": cell.setting} | seeds | about,
        mode=mode,
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    for task, rounds in cell.curves.items():
        # Over examples, of which all settings see as many, in however many rounds.
        run.define_metric(f"{task}/*", step_metric=f"{task}/examples")
        for record in rounds:
            numbers = {key: record[key] for key in ("loss", "examples", "seconds")}
            numbers |= record["metrics"]
            run.log({f"{task}/{key}": value for key, value in numbers.items()})
    for metric, x in cell.scores.items():
        scored = np.asarray(x)[~np.isnan(x)]
        if scored.size:
            run.summary[metric] = float(scored.mean()) if metric == "nll" else percent(scored)
    cost = cell.cost._asdict() | {
        "bytes_up": cell.cost.bytes_up,
        "bytes_down": cell.cost.bytes_down,
    }
    run.summary.update({f"cost/{name}": value for name, value in cost.items()} | cell.controls)
    run.finish()
