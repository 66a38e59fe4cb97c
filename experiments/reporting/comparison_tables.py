"""The tables of the comparison of strategies, from the rows of `comparison`."""

from collections.abc import Sequence
from typing import Any

from experiments.reporting.comparison import METRICS, own
from experiments.reporting.tables import (
    MISSING,
    Column,
    Table,
    difference,
    interval,
    number,
    p_value,
    signed,
    words,
)

WHO = (words("strategy", "strategy"), words("regime", "regime"))


def glance_table(rows: Sequence[dict[str, Any]]) -> Table:
    """EM of every strategy, one column per regime."""
    em = {(row["strategy"], row["regime"]): row for row in rows}
    regimes = dict.fromkeys(row["regime"] for row in rows)

    def column(regime):
        shown = interval(regime, "em").show

        def show(row):
            found = em.get((row["strategy"], regime))
            return MISSING if found is None else shown(found)

        return Column(regime, show)

    strategies = [{"strategy": name} for name in dict.fromkeys(row["strategy"] for row in rows)]
    return Table((WHO[0], *map(column, regimes)), strategies)


def strategies_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of a paper."""
    return Table(
        (
            *WHO,
            words("labels", "labels"),
            number("seeds", "seeds", 0),
            interval("EM [95% CI]", "em"),
            interval("F1 [95% CI]", "f1"),
            interval("Recall@5 [95% CI]", "recall_at_5"),
            interval("MRR@10 [95% CI]", "mrr"),
            words("epochs", "epochs"),
            words("at cap", "at_cap"),
            number("seconds", "seconds"),
            number("device-s", "device_seconds"),
            number("search device-s", "search_seconds", 0),
            number("TFLOP", "flops", 2, 1e12),
            number("MB up", "bytes_up", 1, 1e6),
            number("MB down", "bytes_down", 1, 1e6),
            number("MB corpus", "bytes_corpus", 1, 1e6),
        ),
        [row | {"bytes_corpus": row["bytes_passages"] + row["bytes_vectors"]} for row in rows],
    )


def own_topics_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every metric on questions from each client's own topics."""
    columns = (interval(f"{title} [95% CI]", own(metric)) for metric, title in METRICS.items())
    return Table((*WHO, *columns), [row for row in rows if own("em") in row])


def headline_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Federated training compared with the better lone client."""
    return Table(
        (
            words("strategy", "strategy"),
            words("federated", "regime"),
            interval("[95% CI]", "federated"),
            words("against", "against"),
            interval("[95% CI]", "local"),
            difference("difference [95% CI]"),
            number("of compute", "compute"),
            number("of data", "data"),
            p_value("p", "p_holm"),
            p_value("p over seeds", "p_t_holm"),
        ),
        rows,
    )


def against_local_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the same table for every metric, on all topics and on clients' own."""
    titles = METRICS | {own(metric): f"{title}, own topics" for metric, title in METRICS.items()}
    return Table(
        (
            Column("metric", lambda row: titles[row["metric"]], "left"),
            words("strategy", "strategy"),
            words("federated", "regime"),
            words("against", "against"),
            difference("difference [95% CI]"),
            p_value("p", "p_holm"),
            p_value("p over seeds", "p_t_holm"),
        ),
        rows,
    )


def every_metric_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Regimes against each other, a column for each metric."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        strategy, regime, against = row["strategy"], row["regime"], row["against"]
        if against.startswith(f"{strategy}, "):
            key = strategy, regime, against
            about = {"strategy": strategy, "regime": regime, "against": against.split(", ")[1]}
            one = {f"{row['metric']}_{name}": value for name, value in row.items()}
            found[key] = found.get(key, about) | one

    columns = (_marked(title, metric) for metric, title in METRICS.items())
    return Table((*WHO, words("against", "against"), *columns), list(found.values()))


def _marked(title: str, metric: str) -> Column:
    """A difference with its interval, and whether it differs (*) or is equivalent (≈)."""
    shown = difference(title, f"{metric}_").show

    def show(row):
        differs = row.get(f"{metric}_p_holm", 1) < 0.05
        return shown(row) + differs * " *" + (row.get(f"{metric}_p_e_holm", 1) < 0.05) * " ≈"

    return Column(f"{title} [95% CI]", show)


def without_labels_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows that remain if training questions have no gold passages."""
    em, recall, seconds = (
        interval("EM [95% CI]", "em"),
        number("Recall@5", "recall_at_5"),
        number("seconds", "seconds"),
    )

    def unless(column, instead="–"):
        return column._replace(
            show=lambda row: instead if row["labels"] == "yes" else column.show(row)
        )

    return Table((*WHO, unless(em, "needs gold passages"), unless(recall), unless(seconds)), rows)


def comparisons_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Paired differences of one metric."""
    return Table(
        (
            *WHO,
            words("against", "against"),
            difference("difference [95% CI]"),
            number("d_z", "effect", 2),
            number("% better", "better"),
            number("% worse", "worse"),
            p_value("p", "p_holm"),
            p_value("p over seeds", "p_t_holm"),
            p_value("p of equivalence", "p_e_holm"),
        ),
        rows,
    )


def independent_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Against `independent`."""
    metrics = (_marked(title, metric) for metric, title in METRICS.items())
    return Table(
        (
            *WHO,
            *metrics,
            interval("seconds × [least, most]", "seconds_ratio", 2),
            interval("FLOP × [least, most]", "flops_ratio", 2),
        ),
        rows,
    )


def times_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Seconds by part."""
    parts = (
        "retrieve", "collate", "train", "aggregate", "embed", "validate", "evaluate", "compile"
    )  # fmt: skip
    return Table((*WHO, *(number(part, f"{part}_seconds", 2) for part in parts)), rows)


def costs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The other costs of a cell."""
    return Table(
        (
            *WHO,
            number("TFLOP", "flops", 2, 1e12),
            number("TFLOP by compiler", "flops_compiler", 2, 1e12),
            number("peak MB", "peak_bytes", 0, 1e6),
            number("Mtokens", "tokens", 2, 1e6),
            number("refreshes", "refreshes", 0),
            number("MB up", "bytes_up", 1, 1e6),
            number("MB down", "bytes_down", 1, 1e6),
            number("MB passages", "bytes_passages", 1, 1e6),
            number("MB vectors", "bytes_vectors", 1, 1e6),
        ),
        rows,
    )


def traffic_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Bytes of trained parameters sent, by part and type."""
    about = (words(name, name) for name in ("direction", "part", "dtype"))
    return Table((*WHO, *about, number("MB", "bytes", 2, 1e6)), rows)


def clients_table(rows: Sequence[dict[str, Any]]) -> Table:
    """EM over clients, for rows that have it, and its difference from the centralised model."""
    titles = {"mean": "mean", "worst": "worst client", "decile_1": "1st decile",
              "decile_9": "9th decile"}  # fmt: skip

    def against(name):
        def show(row):
            difference = row.get(f"client_em_{name}_against")
            return MISSING if difference is None else signed(difference)

        return Column(f"{titles[name]} against centralised", show)

    columns = (number(title, f"client_em_{name}") for name, title in titles.items())
    return Table(
        (*WHO, *columns, against("mean"), against("worst")),
        [row for row in rows if "client_em_mean" in row],
    )


def controls_table(rows: Sequence[dict[str, Any]]) -> Table:
    """EM where it must be low or high, and the recall of an approximate index."""
    titles = {"closed_book_em": "no passage", "distractor_em": "a distractor",
              "gold_em": "gold, one hop", "gold_em_two_hop": "gold, two hops",
              "index_recall": "index recall"}  # fmt: skip
    names = [name for name in titles if any(name in row for row in rows)]
    return Table((*WHO, *(number(titles[name], name) for name in names)), rows)
