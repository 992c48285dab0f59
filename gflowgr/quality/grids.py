"""Settings chosen on the validation part: what was tried for a row, and what was best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gflowgr.folders import write_text
from gflowgr.quality.rows import ROWS
from gflowgr.settings import merge, override

FORMAT = "gflowgr.grid/1"
METRIC = "ndcg@10"


def grid_path(row: str, data_set: str, results: Path) -> Path:
    return results / data_set / "tuning" / f"{row}.json"


def read_grid(row: str, data_set: str, results: Path) -> list[dict[str, Any]]:
    """The points tried so far: "settings" by dotted names, "base", the digest of the row's other settings at
    that time, "validation" metrics, "seed", "steps", "seconds", "commit", "device".

    Raises:
        ValueError: the file is something else.
    """
    path = grid_path(row, data_set, results)
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of the format {FORMAT}")
    points: list[dict[str, Any]] = document["points"]
    return points


def write_grid(row: str, data_set: str, results: Path, points: Sequence[Mapping[str, Any]]) -> None:
    chosen = best_point([point for point in points if point["base"] == base_of(row)])
    document = {"format": FORMAT, "row": row, "metric": METRIC, "chosen": chosen, "points": list(points)}
    path = grid_path(row, data_set, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")


def base_of(row: str) -> str:
    """A digest of a row's settings but for those that its grid chooses."""
    # The grid's own names are blank whatever the row says of them.
    blank = nested(dict.fromkeys(ROWS[row].grid))
    settings = json.dumps(merge(ROWS[row].settings, blank), sort_keys=True, default=dict)
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def tried_points(row: str, data_set: str, results: Path) -> list[dict[str, Any]]:
    """The points that were tried with the settings that the row has now."""
    return [point for point in read_grid(row, data_set, results) if point["base"] == base_of(row)]


def best_point(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the highest NDCG@10 on validation, the earlier of equals."""
    return dict(max(points, key=lambda point: point["validation"][METRIC])["settings"])


def untried(row: str, data_set: str, results: Path) -> list[dict[str, Any]]:
    """The points of a row's grid that have not been tried with the settings that the row has now."""
    known = [point["settings"] for point in tried_points(row, data_set, results)]
    return [point for point in ROWS[row].points() if point not in known]


def add_point(row: str, data_set: str, results: Path, point: Mapping[str, Any]) -> None:
    """Writes a point that was tried beside the others, in the grid's order whichever came first."""
    order = ROWS[row].points()
    points = [*read_grid(row, data_set, results), point]
    points.sort(key=lambda each: order.index(each["settings"]) if each["settings"] in order else -1)
    write_grid(row, data_set, results, points)


def chosen_settings(row: str, data_set: str, results: Path) -> dict[str, Any]:
    """The best point of a row's whole grid as nested settings; nothing where it was not tuned."""
    points = tried_points(row, data_set, results)
    if not points or untried(row, data_set, results):
        return {}
    return nested(best_point(points))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as sections."""
    return override({}, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def grid_of(row: str, data_set: str, results: Path) -> dict[str, Any] | None:
    """What a result file says of the tuning behind it."""
    if not chosen_settings(row, data_set, results):
        return None
    return {"file": f"tuning/{row}.json", "points": len(tried_points(row, data_set, results))}
