"""The README's Python examples run as they stand, on data of the shape that they name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import training_fixtures as fixtures

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def block(which: str) -> str:
    found = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if which in code]
    assert len(found) == 1, f"the README has {len(found)} Python examples with {which!r}"
    return found[0]


def test_the_loop_of_ones_own() -> None:
    names: dict[str, object] = {}
    exec(block("trie_trajectory_balance"), names)
    assert names["log_probs"].shape == (2, 3)
    assert names["logits"].grad.abs().sum() > 0


def test_from_a_log_to_a_recommender(tmp_path, monkeypatch, capsys) -> None:
    data, semantic_ids = fixtures.world()
    rows = [
        f"{user},{item},{position},5"
        for user in range(len(data.sequences.offsets) - 1)
        for position, item in enumerate(_whole_sequence(data, user))
    ]
    (tmp_path / "ratings.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]) + "\n")
    np.save(tmp_path / "codes.npy", semantic_ids.codes.numpy())
    monkeypatch.chdir(tmp_path)
    code = block("GFlowGRTrainer")
    assert "max_steps=2000" in code
    exec(code.replace("max_steps=2000", "max_steps=3, use_cpu=True"), {})
    assert "eval_ndcg@10" in capsys.readouterr().out


def _whole_sequence(data, user: int) -> list[int]:
    offsets = data.sequences.offsets
    training = data.sequences.items[offsets[user] : offsets[user + 1]].tolist()
    return [*training, int(data.validation.target[user]), int(data.test.target[user])]
