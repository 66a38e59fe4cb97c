"""Learning curves, from the records that trainings leave in their folders."""

import numpy as np

from fedrag_jax.data.json_lines import json_rows
from fedrag_jax.federated.stopping import read_evaluations


def training_curves(tuners) -> dict:
    """Returns the learning curve of each task, a point for each index refresh of the budget.

    The last has `epochs`: how often the training examples were seen. Where validation decided when to
    stop, points have its `validation` loss, and the last has the `kept_epochs` of the models that were
    kept and how many of the `trainings` ended `at_cap`, still improving.
    """
    curves = {}
    for task in tuners[0].costs if tuners else ():
        folders = [t.folder / task for t in tuners]
        logs = [json_rows(folder / "rounds.jsonl") for folder in folders]
        histories = [[record for record, _ in log] for log in logs]
        stretch = tuners[0].budget.schedule(tuners[0].regime).refresh_every
        points, held = curve(histories, stretch), len(tuners[0].examples)
        points[-1]["epochs"] = points[-1]["examples"] / held
        if tuners[0].budget.stopping:
            judged = [read_evaluations(folder / "validation.jsonl") for folder in folders]
            points[-1] |= kept_models(histories, judged, held)
            for point in points:
                at = [e for some in judged for e in some if e["round"] == point["round"] * stretch]
                if len(at) == len(tuners):
                    point["validation"] = float(np.mean([e["loss"] for e in at]))
        curves[task] = points
    return curves


def kept_models(histories, judged, held: int) -> dict[str, float]:
    """Returns `kept_epochs`, `at_cap` and `trainings` of trainings that stop by validation.

    Args:
      histories: records of each training.
      judged: its evaluations.
      held: examples of an epoch.
    """
    best = [int(min(some, key=lambda e: e["loss"])["round"]) for some in judged]
    examples = [h[r - 1]["examples"] if r else 0 for h, r in zip(histories, best, strict=True)]
    at_cap = [r == h[-1]["rounds"] for h, r in zip(histories, best, strict=True)]
    return {
        "kept_epochs": sum(examples) / held,
        "at_cap": sum(at_cap),
        "trainings": len(histories),
    }


def curve(histories, stretch: int) -> list[dict]:
    """Returns points: means over clients and over `stretch` rounds; examples and seconds are summed.

    A client who has stopped stays where it was, and so does a training in rounds that nobody answers.
    """
    histories, points = [_answered(records) for records in histories], []
    for start in range(0, max(map(len, histories)), stretch):
        stretches = [records[start : start + stretch] or records[-1:] for records in histories]
        some = [record for records in stretches for record in records]
        points.append(
            {
                "round": start // stretch + 1,
                "loss": float(np.mean([r["loss"] for r in some])),
                "metrics": {
                    name: float(np.mean([r["metrics"][name] for r in some]))
                    for name in some[0]["metrics"]
                },
                "examples": sum(records[-1]["examples"] for records in stretches),
                "seconds": sum(
                    r["seconds"] for records in histories for r in records[start : start + stretch]
                ),
            }
        )
    return points


def _answered(records: list[dict]) -> list[dict]:
    """Returns records whose loss and metrics are those of the last round with an answer."""
    last = next(
        (r for r in records if r["loss"] is not None), {"loss": float("nan"), "metrics": {}}
    )
    found = []
    for record in records:
        last = record if record["loss"] is not None else last
        found.append(record | {"loss": last["loss"], "metrics": last["metrics"]})
    return found
