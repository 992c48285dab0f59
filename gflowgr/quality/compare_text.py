"""The comparison of two runs as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from gflowgr.page import number, signed
from gflowgr.quality.compare import Compared, Comparison, Group

_COLUMNS = ("A", "B", "A - B", "95% interval")


def text_tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """What to print: titles, each with a table, its header first."""
    metrics = [["metric", *_COLUMNS], *([_short(c.metric), *cells(c)] for c in comparison.metrics)]
    return [
        (facts(comparison), metrics),
        ("by items in the user's history", _group_rows("history", comparison.by_length, named=False)),
        ("by popularity of the target", _group_rows("target", comparison.by_popularity, named=True)),
    ]


def cells(compared: Compared) -> list[str]:
    """A, B, the difference and its interval as they are shown."""
    low, high = compared.difference.low, compared.difference.high
    interval = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
    assert compared.difference.value is not None
    return [number(compared.a.value), number(compared.b.value), signed(compared.difference.value), interval]


def facts(comparison: Comparison) -> str:
    """What is compared on what."""
    parts = [f"{comparison.num_users:,} users, {comparison.num_items:,} items"]
    return "; ".join([*parts, *filter(None, (comparison.seeds, comparison.excluded))])


def _group_rows(title: str, groups: Sequence[Group], *, named: bool) -> list[list[str]]:
    rows = [[title, *(["in training"] if named else []), "users", "metric", *_COLUMNS]]
    for group in groups:
        for place, compared in enumerate(group.metrics):
            head = [*([group.name] if named else []), group.range, f"{group.users:,}"]
            # Only the first line of a group says which it is.
            rows.append(
                [*(head if not place else [""] * len(head)), _short(compared.metric), *cells(compared)]
            )
    return rows


def _short(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "N")
