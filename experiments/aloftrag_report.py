"""The report of experiments/aloftrag.py: tables, a figure, CSV files."""

import pathlib

import numpy as np

from experiments.aloftrag_lab import BASE, METRICS
from experiments.reporting import citing_figures, comparison, differences, tables
from experiments.reporting.comparison import costs_and_clients
from experiments.reporting.page import Report, Section
from experiments.run import finished
from fedrag_jax.files import read_json

COLUMNS = (
    "variant", "seeds",
    *(
        f"{name}{part}"
        for name in ("answer", "citation", "by_heart")
        for part in ("", "_low", "_high", "_sd")
    ),
    "citation_f1",
)  # fmt: skip


def cells_of(config, folder: pathlib.Path, variant: str, regime: str) -> list:
    """Returns the cells of all seeds; every regime has the same untuned cells."""
    return finished(config, folder, variant, config.regimes[0] if variant == BASE else regime)


def main_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each variant in the first regime: most passages, the gold one forced in."""
    n, regime, rows = max(config.contexts), config.regimes[0], []
    start = cells_of(config, folder, BASE, regime)
    for variant in config.variants:
        if not (found := cells_of(config, folder, variant, regime)):
            continue
        row = {"variant": variant, "seeds": len(found)}
        for name, metric in main_metrics(n).items():
            row |= comparison.estimate(found, metric, name)
            if variant != BASE and start:
                row |= differences.paired_difference(found, start, metric, prefix=f"{name}_by_")
        for metric in METRICS[3:]:
            row[metric] = mean(found, f"{metric}_{n}")
        repeats = [metric for metric in found[0].scores if metric.startswith("judged_")]
        verdicts = [v for v in (mean(found, metric) for metric in repeats) if v is not None]
        if verdicts:
            row["judged"] = float(np.mean(verdicts))
            row["judged_sd"] = float(np.std(verdicts, ddof=len(verdicts) > 1))
            unread = [np.isnan(cell.scores[metric]).mean() for cell in found for metric in repeats]
            row["judge_unread"] = 100 * float(np.mean(unread))
        rows.append(row)
    for name in main_metrics(n):
        differences.adjust(rows, f"{name}_by_")
    return rows


def main_metrics(n: int) -> dict[str, str]:
    """Returns the main table's metrics: with n passages, the gold one among them, or with none."""
    return {"answer": f"em_{n}", "citation": f"citation_{n}", "by_heart": "em_none"}


def mean(cells, metric: str, where: str = "", value: float = 1.0) -> float | None:
    """Returns estimates in percent over seeds, on questions where another score has a value."""
    found = []
    for cell in cells:
        scores = cell.scores[metric]
        found.append(scores[cell.scores[where] == value] if where else scores)
    found = np.concatenate(found)
    found = found[~np.isnan(found)]
    return 100 * float(found.mean()) if found.size else None


def context_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each variant, regime and number of passages."""
    rows = []
    for regime in config.regimes:
        for variant in config.variants:
            found = cells_of(config, folder, variant, regime)
            if not found or (variant == BASE and regime != config.regimes[0]):
                continue
            for n in config.contexts:
                row = {"variant": variant, "regime": regime, "passages": n}
                for name, metric in (("answer", "em"), ("citation", "citation")):
                    row |= comparison.estimate(found, f"{metric}_{n}", name)
                    row[f"{name}_easy"] = mean(found, f"{metric}_{n}", f"hard_{n}", 0.0)
                    row[f"{name}_hard"] = mean(found, f"{metric}_{n}", f"hard_{n}", 1.0)
                    if n == max(config.contexts):
                        row[f"{name}_found"] = mean(found, f"{metric}_found")
                row["answer_uncited"] = mean(found, f"em_{n}", f"citation_{n}", 0.0)
                row["recall"] = mean(found, f"recall_at_{n}")
                row["abstained"] = mean(found, f"abstained_{n}")
                if n == max(config.contexts):
                    row["abstained_none"] = mean(found, "abstained_none")
                    row |= {f"recall_{k}": mean(found, f"recall_at_{k}") for k in config.contexts}
                rows.append(row)
    return rows


def silo_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns rows by variant and regime: the mean over silos, the worst silo, and each silo."""
    silos = read_json(folder / "silos.json")
    of_question, n, rows = np.array(silos["of_question"]), max(config.contexts), []
    if len(silos["names"]) < 2:
        return []
    for regime in config.regimes:
        for variant in config.variants:
            found = cells_of(config, folder, variant, regime)
            if not found or (variant == BASE and regime != config.regimes[0]):
                continue
            cost = costs_and_clients(found)
            row = {"variant": variant, "regime": "" if variant == BASE else regime}
            row |= {"bytes_up": cost["bytes_up"], "seconds": cost["seconds"]}
            for name, metric in (("answer", f"em_{n}"), ("citation", f"citation_{n}")):
                scores = np.mean([cell.scores[metric] for cell in found], axis=0)
                values = {
                    silo: 100 * float(scores[of_question == i].mean())
                    for i, silo in enumerate(silos["names"])
                    if (of_question == i).any()
                }
                worst = min(values, key=values.get)
                row |= {f"{name}_mean": float(np.mean([*values.values()]))}
                row |= {f"{name}_worst": values[worst], f"{name}_worst_silo": worst}
                row |= {f"{name} {silo}": value for silo, value in values.items()}
            rows.append(row)
    return rows


def generated_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each variant: numbers of texts, generated and kept questions, requests."""
    rows = []
    for variant in config.variants:
        found = cells_of(config, folder, variant, config.regimes[0])
        if not found or variant == BASE:
            continue
        counts = found[0].controls
        row = {"variant": variant, "requests": counts.get("requests")}
        for step in ("texts", "questions", "ratings"):
            some = {
                k.partition(" ")[2]: int(v) for k, v in counts.items() if k.startswith(step + " ")
            }
            if not some:
                continue
            dropped = ", ".join(f"{v} {k}" for k, v in some.items() if k != "kept" and v)
            row[step] = f"{some['kept']:,} of {sum(some.values()):,}" + (
                f" ({dropped})" if dropped else ""
            )
        rows.append(row)
    return rows


NAMES = {"base": "base", "all": "all steps", "without_step_1": "without step 1",
         "without_step_3": "without step 3"}  # fmt: skip


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows, contexts = main_rows(config, folder), context_rows(config, folder)
    silos, made = silo_rows(config, folder), generated_rows(config, folder)
    n = max(config.contexts)
    for row in (*rows, *contexts, *silos, *made):
        row["name"] = NAMES.get(row["variant"], row["variant"].replace("_", " "))
    longest = [row for row in contexts if row["passages"] == n]
    judged = [tables.Column("judged (SD over repeats)", _judged)] if _any(rows, "judged") else []
    name = tables.words("variant", "name")
    several = [tables.words("regime", "regime")] if len(config.regimes) > 1 else []
    sections = [
        Section(
            "Answers and citations",
            "ablation",
            f"Percent of the {config.data.split} questions ({config.regimes[0]} training), read "
            f"among {n} passages of which one is gold. Answers: exact match. Citations: whether "
            "the gold passage is among the cited ones, and F1 of the cited ones. Memorised: "
            "correct answers without the gold passage in the context; the generator is trained "
            "on questions about the tested texts, so an increase there is memorisation. 95% "
            "intervals are over seeds and questions. Differences from the untuned generator are "
            "paired by question and seed; p by permutation over questions, Holm-adjusted over "
            "each column.",
            tables.Table(
                [
                    name,
                    tables.interval("answer [95% CI]", "answer"),
                    tables.difference("against base", "answer_by_"),
                    tables.p_value("p", "answer_by_p_holm"),
                    tables.interval("citation [95% CI]", "citation"),
                    tables.difference("against base", "citation_by_"),
                    tables.p_value("p", "citation_by_p_holm"),
                    tables.number("citation F1", "citation_f1"),
                    tables.interval("memorised [95% CI]", "by_heart"),
                    tables.difference("against base", "by_heart_by_"),
                    tables.p_value("p", "by_heart_by_p_holm"),
                    *judged,
                ],
                rows,
            ),
        ),
        Section(
            "Figure",
            "passages",
            "Answers and citations by the number of passages read, including the gold passage.",
            figure=citing_figures.over_passages(contexts, config.regimes[0]),
        ),
        Section(
            "Easy and hard questions",
            "easy_hard",
            "Hard questions are those whose gold passage is not among the nearest and replaced "
            "the last passage. The last column gives correct answers among those that do not "
            "cite the gold passage.",
            tables.Table(
                [
                    name,
                    *several,
                    *(
                        tables.number(f"{what}, {of}", f"{what}_{of}")
                        for what in ("answer", "citation")
                        for of in ("easy", "hard")
                    ),
                    tables.number("answer if not cited", "answer_uncited"),
                ],
                longest,
            ),
        ),
        Section(
            "From end to end",
            "end_to_end",
            f"Whether the gold passage is among the nearest, and results with the {n} retrieved "
            "passages: correct answers, and citations, where citing none is correct if no gold "
            "passage is among them.",
            tables.Table(
                [
                    name,
                    *several,
                    *(tables.number(f"Recall@{k}", f"recall_{k}") for k in config.contexts),
                    tables.number("answer", "answer_found"),
                    tables.number("citation", "citation_found"),
                ],
                longest,
            ),
        ),
        Section(
            "Where nothing answers",
            "abstention",
            "Percent of answers that cite no passage: without the gold passage among the "
            "nearest, where this is correct, and with it, where this is wrong.",
            tables.Table(
                [
                    name,
                    *several,
                    tables.number("without gold passage", "abstained_none"),
                    tables.number("with it", "abstained"),
                ],
                longest,
            ),
        ),
        Section(
            "Silos",
            "silos",
            f"Means over silos, each evaluated on its own texts, and the worst silo, with {n} "
            "passages.",
            tables.Table(
                [
                    name,
                    tables.words("regime", "regime"),
                    tables.number("answer, mean", "answer_mean"),
                    tables.number("worst", "answer_worst"),
                    tables.words("", "answer_worst_silo"),
                    tables.number("citation, mean", "citation_mean"),
                    tables.number("worst", "citation_worst"),
                    tables.words("", "citation_worst_silo"),
                    tables.number("MB up", "bytes_up", 1, 1e6),
                    tables.number("seconds", "seconds", 0),
                ],
                silos,
            ),
        ),
        Section(
            "What the generator wrote",
            "generated",
            f"Items kept in each step ({config.regimes[0]}), and reasons why others were dropped. "
            "Variants share requests to the generator, and seeds share the questions it wrote: seeds "
            "differ in contexts and training.",
            tables.Table(
                [
                    name,
                    tables.words("texts", "texts"),
                    tables.words("questions", "questions"),
                    tables.words("rated questions", "ratings"),
                    tables.number("requests", "requests", 0),
                ],
                made,
            ),
        ),
    ]
    t = config.training
    who = config.author.model or config.models.generator
    return Report(
        folder.name,
        f"Label-free fine-tuning on {config.data.name}: {who} rates texts and asks about them, "
        f"{config.models.generator} learns to cite and to answer in {t.rounds} x {t.local_steps} "
        "steps "
        f"of {t.batch_size} contexts" + (" at each silo." if config.silos else "."),
        sections,
        {"aloftrag.csv": rows, "contexts.csv": contexts, "silos.csv": silos},
        {"aloftrag.csv": COLUMNS},
    )


def _any(rows, key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _judged(row) -> str:
    if row.get("judged") is None:
        return tables.MISSING
    unread = f", {row['judge_unread']:.0f}% unread" if row["judge_unread"] else ""
    return f"{row['judged']:.1f} ({row['judged_sd']:.1f}{unread})"
