"""The README's Python examples run as they stand, on data of the shape that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import training_fixtures as fixtures

from gflowgr import cli
from gflowgr.backbones import build_t5

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


def test_generating_and_changing_a_catalogue(tmp_path, monkeypatch) -> None:
    _, semantic_ids = fixtures.world()
    trie = semantic_ids.trie()
    inputs = torch.randint(3, semantic_ids.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    new = semantic_ids.tokens[:3].flip(0).numpy()
    names: dict[str, object] = {
        "model": build_t5(semantic_ids, layers=1, d_model=16, heads=2, d_kv=8, d_ff=16).transformer,
        "inputs": {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)},
        "trie": trie,
        "bought": [[0, 1], [2]],
        "in_stock": list(range(trie.num_items - 2)),
        "users": torch.tensor([7, 8]),
        "new_sequences": new,
    }
    monkeypatch.chdir(tmp_path)
    exec(block("sample_without_replacement"), names)
    assert not {0, 1} & set(names["best"].items[0].tolist())
    assert names["best"].items.max() < trie.num_items - 2
    assert names["group"].log_inclusion.shape == (2, 10)
    assert len(set(names["group"].items[0].tolist())) == 10
    assert names["trie"].num_items == trie.num_items + 3
    assert names["trie"].num_present == trie.num_items + 1


def _whole_sequence(data, user: int) -> list[int]:
    offsets = data.sequences.offsets
    training = data.sequences.items[offsets[user] : offsets[user + 1]].tolist()
    return [*training, int(data.validation.target[user]), int(data.test.target[user])]


def test_from_a_log_to_a_recommender_by_commands(tmp_path, monkeypatch, capsys) -> None:
    data, _ = fixtures.world()
    rows = [
        f"{user},{item},{position}"
        for user in range(len(data.sequences.offsets) - 1)
        for position, item in enumerate(_whole_sequence(data, user))
    ]
    (tmp_path / "ratings.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    titles = [
        "Toy Story (1995)",
        *(f"Film {item} of {1900 + item % 7}" for item in range(1, fixtures.NUM_ITEMS)),
    ]
    items = [f"{item},{title}" for item, title in enumerate(titles)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"```bash\n(gflowgr prepare.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split()[1] for line in commands] == ["prepare", "tokenize", "train", "recommend", "evaluate"]
    for line in commands:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "train":
            arguments += ["training.max_steps=2", "training.use_cpu=true", "collaborative.sasrec.epochs=1"]
        assert cli.main(arguments) == 0, line
    assert "Film" in capsys.readouterr().out
