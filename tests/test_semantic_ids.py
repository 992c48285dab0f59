from __future__ import annotations

import json
import sys
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gflowgr import semantic_ids
from gflowgr.semantic_ids import (
    SemanticIds,
    count_collisions,
    embed_sentences,
    embed_text,
    quantise,
    resolve_collisions,
)

# Ragged rows over few codes, so that many collide and some are prefixes of others.
code_rows = st.integers(1, 4).flatmap(
    lambda levels: st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=levels).map(
            lambda row: row + [-1] * (levels - len(row))
        ),
        min_size=1,
        max_size=30,
    )
)


def blobs(num_items: int, dimensions: int, *, seed: int = 0) -> np.ndarray:
    """Points around 4 far centres, item i around centre i % 4."""
    generator = np.random.default_rng(seed)
    centres = 20 * np.eye(4, dimensions)
    return centres[np.arange(num_items) % 4] + generator.normal(size=(num_items, dimensions))


class TestEmbedText:
    texts = ("red shoe", "red shoes and a red hat", "blue hat", "garden hose", "garden hose 2", "red shoe")

    def test_rows_are_unit_vectors_in_which_shared_words_are_near(self) -> None:
        embeddings = embed_text(self.texts, dimensions=4)
        assert embeddings.shape == (6, 4)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
        near = embeddings @ embeddings.T
        np.testing.assert_allclose(near[0, 5], 1, rtol=1e-5)
        assert near[3, 4] > 0.5 > abs(near[0, 3])
        assert near[0, 1] > 0.3

    def test_keeps_the_cosines_of_tf_idf_with_enough_dimensions(self) -> None:
        # By hand: (1 + ln count) * (1 + ln((1 + N) / (1 + N with the word))), rows of length 1.
        words = sorted({word for text in self.texts for word in text.split()})
        counts = np.array([[text.split().count(word) for word in words] for text in self.texts])
        weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
        weights = weights * (1 + np.log((1 + len(counts)) / (1 + (counts > 0).sum(0))))
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        embeddings = embed_text(self.texts, dimensions=64)
        np.testing.assert_allclose(embeddings @ embeddings.T, weights @ weights.T, atol=1e-5)

    def test_a_seed_gives_the_same_again(self) -> None:
        # Far more words than dimensions, or the randomised decomposition would be exact whatever the seed.
        words = np.random.default_rng(0).integers(300, size=(200, 8))
        texts = [" ".join(map(str, row)) for row in words]
        np.testing.assert_array_equal(embed_text(texts, 5, seed=3), embed_text(texts, 5, seed=3))
        assert not np.allclose(embed_text(texts, 5, seed=3), embed_text(texts, 5, seed=4))

    def test_missing_texts_are_zeros_and_change_no_other(self) -> None:
        texts = [None, "red shoe", float("nan"), "blue hat", "  ", ""]
        embeddings = embed_text(texts, 2)
        assert not embeddings[[0, 2, 4, 5]].any()
        np.testing.assert_allclose(np.linalg.norm(embeddings[[1, 3]], axis=1), 1, rtol=1e-5)

    @pytest.mark.parametrize(
        ("texts", "columns"), [(["shoe"] * 5, 1), (["a b c d e f"], 1), (["x y", "y z", "z x", None], 3)]
    )
    def test_few_words_or_texts_give_fewer_dimensions(self, texts: list[str | None], columns: int) -> None:
        embeddings = embed_text(texts, 64)
        assert embeddings.shape == (len(texts), columns)
        assert np.isfinite(embeddings).all()

    @pytest.mark.parametrize(
        ("texts", "dimensions", "error", "words"),
        [
            ([None, "", "!?"], 4, ValueError, "one word, got none in 3"),
            ([], 4, ValueError, "at least one item"),
            (["a", 3], 4, TypeError, "got 3 for item 1"),
            (["a"], 0, ValueError, "dimensions needs to be at least 1"),
        ],
    )
    def test_bad_input(self, texts: list, dimensions: int, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            embed_text(texts, dimensions)


class TestEmbedSentences:
    def test_names_the_extra_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ImportError, match=r"pip install 'gflowgr\[text\]'"):
            embed_sentences(["a"])

    def test_asks_the_library_for_unit_vectors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Encoder:
            def __init__(self, model: str, device: str | None) -> None:
                assert (model, device) == ("some/model", "cpu")

            def encode(self, texts: list[str], **options: object) -> np.ndarray:
                assert options["normalize_embeddings"] is True
                assert options["batch_size"] == 7
                return np.array([[len(text), 1.0] for text in texts])

        library = types.ModuleType("sentence_transformers")
        library.SentenceTransformer = Encoder  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sentence_transformers", library)
        embeddings = embed_sentences(["abc", "  ", None, "de"], "some/model", batch_size=7, device="cpu")
        assert embeddings.tolist() == [[3, 1], [0, 0], [0, 0], [2, 1]]
        assert embeddings.dtype == np.float32


class TestQuantise:
    def test_the_first_level_finds_the_clusters(self) -> None:
        codes = quantise(blobs(200, 8), levels=2, codes=4)
        assert codes.shape == (200, 2)
        assert codes.dtype == np.int64
        assert {tuple(row) for row in codes[:, 0].reshape(-1, 4)} == {tuple(codes[:4, 0])}
        assert sorted(codes[:4, 0]) == [0, 1, 2, 3]

    def test_each_level_halves_what_the_ones_before_left(self) -> None:
        points = blobs(400, 3)
        codes = quantise(points, levels=4, codes=16)
        left = []
        for levels in range(5):
            groups: dict[tuple[int, ...], list[int]] = {}
            for item, row in enumerate(codes[:, :levels]):
                groups.setdefault(tuple(row), []).append(item)
            left.append(
                sum(((points[items] - points[items].mean(0)) ** 2).sum() for items in groups.values())
            )
        assert all(after < before / 2 for before, after in pairwise(left))

    def test_a_seed_gives_the_same_again_and_another_differs(self) -> None:
        points = blobs(300, 8)
        np.testing.assert_array_equal(quantise(points, codes=16, seed=1), quantise(points, codes=16, seed=1))
        assert (quantise(points, codes=16, seed=1) != quantise(points, codes=16, seed=2)).any()

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 3), st.sampled_from([2, 8, 256]))
    def test_any_small_catalogue(self, num_items: int, dimensions: int, levels: int, codes: int) -> None:
        points = np.random.default_rng(0).normal(size=(num_items, dimensions))
        rows = quantise(points, levels, codes)
        assert rows.shape == (num_items, levels)
        assert rows.min() >= 0
        assert rows.max() < min(codes, max(2, 2 ** int(np.log2(num_items))))

    def test_two_items_come_apart(self) -> None:
        assert len(set(quantise([[0.0, 1.0], [5.0, 1.0]], levels=1)[:, 0])) == 2

    def test_equal_items_share_their_codes(self) -> None:
        codes = quantise(np.full((50, 8), 0.3), levels=3, codes=16)
        assert len(np.unique(codes, axis=0)) == 1
        points = np.repeat(blobs(40, 8), 2, axis=0)
        codes = quantise(points, levels=2, codes=8)
        np.testing.assert_array_equal(codes[::2], codes[1::2])

    def test_says_nothing_on_small_catalogues(self, capfd: pytest.CaptureFixture[str]) -> None:
        quantise(blobs(50, 8), levels=2, codes=16)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("embeddings", "options", "words"),
        [
            ([[0.0, 1], [np.nan, 1], [np.inf, 0]], {}, r"item 1 has others \(2 such items\)"),
            ([[1e39, 1.0], [0.0, 1.0]], {}, "item 0"),
            (np.zeros((0, 4)), {}, r"got \(0, 4\)"),
            (np.zeros((4, 0)), {}, r"got \(4, 0\)"),
            (np.zeros(4), {}, r"got \(4,\)"),
            (np.zeros((4, 4)), {"codes": 100}, "power of two, got 100"),
            (np.zeros((4, 4)), {"codes": 1}, "codes needs to be at least 2"),
            (np.zeros((4, 4)), {"levels": 0}, "levels needs to be at least 1"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    def test_bad_input(self, embeddings: object, options: dict, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            quantise(embeddings, **options)

    def test_names_the_extra_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ImportError, match=r"pip install 'gflowgr\[train\]'"):
            quantise(blobs(10, 3))


class TestCollisions:
    def test_by_hand(self) -> None:
        codes = [[1, 2], [0, 0], [1, 2], [1, -1], [1, 2], [1, -1]]
        resolved = resolve_collisions(codes)
        assert resolved.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 0, -1], [1, 2, 2], [1, 1, -1]]
        assert resolve_collisions(codes, "multiplicity").tolist() == codes

    @given(code_rows)
    def test_an_extra_level_makes_rows_distinct(self, rows: list[list[int]]) -> None:
        resolved = resolve_collisions(rows)
        assert len({tuple(row) for row in resolved.tolist()}) == len(rows)
        met: Counter[tuple[int, ...]] = Counter()
        for before, after in zip(rows, resolved.tolist(), strict=True):
            kept = [code for code in before if code >= 0]
            expected = [*kept, met[tuple(before)]]
            met[tuple(before)] += 1
            assert after == expected + [-1] * (len(before) + 1 - len(expected))

    @given(code_rows)
    def test_what_an_item_is_like_stands_in_the_codes_before(self, rows: list[list[int]]) -> None:
        resolved = SemanticIds(resolve_collisions(rows), extra_level=True)
        assert resolved.content_codes.tolist() == rows
        assert SemanticIds(rows).content_codes.tolist() == rows

    def test_an_extra_level_has_another_before_it(self) -> None:
        for codes in ([[0], [1]], [[0, 1], [1, -1]]):
            with pytest.raises(ValueError, match="extra_level needs two codes an item"):
                SemanticIds(codes, extra_level=True)

    @given(code_rows)
    def test_counts(self, rows: list[list[int]]) -> None:
        groups = Counter(map(tuple, rows))
        counted = count_collisions(torch.tensor(rows, dtype=torch.int16))
        assert counted.num_items == len(rows)
        assert counted.distinct == len(groups)
        assert counted.colliding == sum(groups[tuple(row)] > 1 for row in rows)
        assert counted.largest_group == max(groups.values())

    def test_an_unknown_method(self) -> None:
        with pytest.raises(ValueError, match="got 'drop'"):
            resolve_collisions([[1]], "drop")  # type: ignore[arg-type]


class TestSemanticIds:
    @given(code_rows, st.integers(3, 200))
    def test_levels_have_disjoint_tokens(self, rows: list[list[int]], first_token: int) -> None:
        ids = SemanticIds(rows, codebook_sizes=3, first_token=first_token)
        levels = len(rows[0])
        expected = [
            [code if code < 0 else first_token + 3 * level + code for level, code in enumerate(row)]
            for row in rows
        ]
        assert ids.tokens.tolist() == expected
        assert ids.codes.tolist() == rows
        assert ids.tokens.dtype == ids.codes.dtype == torch.int64
        assert (ids.num_items, ids.length) == (len(rows), levels)
        assert ids.codebook_sizes == (3,) * levels
        assert ids.vocab_size == first_token + 3 * levels

    def test_codebooks_of_different_size(self) -> None:
        ids = SemanticIds([[0, 4], [1, 0]], codebook_sizes=[2, 5])
        assert ids.tokens.tolist() == [[3, 9], [4, 5]]
        assert ids.vocab_size == 10
        assert SemanticIds([[0, 4, -1], [1, 0, -1]]).codebook_sizes == (2, 5, 1)

    def test_special_tokens_stay_free(self) -> None:
        assert (semantic_ids.PAD, semantic_ids.EOS, semantic_ids.BOS) == (0, 1, 2)
        with pytest.raises(ValueError, match="first_token needs to be at least 3, got 2"):
            SemanticIds([[0]], first_token=2)

    def test_the_trie_leads_from_tokens_to_items(self) -> None:
        ids = SemanticIds([[1, 2], [1, 0], [0, 2], [1, 2]])
        trie = ids.trie()
        assert trie is ids.trie()
        for item, tokens in enumerate(ids.tokens):
            assert item in trie.items(int(trie.walk(tokens)[-1])).tolist()
        assert trie.max_token == ids.vocab_size - 1

    @pytest.mark.parametrize(
        ("codes", "sizes", "error", "words"),
        [
            (np.zeros((2, 2)), None, TypeError, "integers, got float64"),
            (np.zeros((2, 2), dtype=bool), None, TypeError, "integers, got bool"),
            ([1, 2], None, ValueError, r"\(items, levels\), got \(2,\)"),
            (np.zeros((0, 2), dtype=int), None, ValueError, r"got \(0, 2\)"),
            (np.zeros((2, 0), dtype=int), None, ValueError, r"got \(2, 0\)"),
            ([[1, 2], [3, -2]], None, ValueError, "got -2 for item 1"),
            ([[1, 2], [-1, -1]], None, ValueError, "item 1 has none"),
            ([[1, 2, 3], [1, -1, 3]], None, ValueError, r"tail .* got \[1, -1, 3\] for item 1"),
            ([[1, 2], [-1, 3]], None, ValueError, r"tail .* \[-1, 3\] for item 1"),
            ([[1, 2], [1, 4]], 4, ValueError, r"level 1 .* below codebook_sizes\[1\] = 4, got 4 for item 1"),
            ([[1, 2], [3, 1]], [3, 3], ValueError, "level 0 .* got 3 for item 1"),
            ([[1, 2]], [3], ValueError, "each of the 2 levels, got 1"),
            ([[1, 2]], [3, 0], ValueError, r"codebook_sizes\[1\] needs to be at least 1, got 0"),
            ([[1, 2]], [3, 3.0], TypeError, r"codebook_sizes\[1\] needs to be an integer"),
        ],
    )
    def test_bad_codes(self, codes: object, sizes: object, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            SemanticIds(codes, sizes)  # type: ignore[arg-type]


class TestNumpyFiles:
    @pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int64, np.uint64])
    def test_ready_made_codes_load_as_they_are(self, tmp_path: Path, dtype: type) -> None:
        codes = np.random.default_rng(0).integers(0, 200, size=(30, 4))
        np.save(tmp_path / "codes.npy", codes.astype(dtype))
        ids = SemanticIds.from_npy(tmp_path / "codes.npy", codebook_sizes=256)
        assert ids.codes.tolist() == codes.tolist()
        assert ids.vocab_size == 3 + 4 * 256

    def test_rows_can_be_picked(self, tmp_path: Path) -> None:
        path = tmp_path / "codes.npy"
        np.save(path, np.array([[0, 1], [-1, -1], [2, 3], [4, 5]], dtype=np.int16))
        assert SemanticIds.from_npy(path, items=np.array([3, 0])).codes.tolist() == [[4, 5], [0, 1]]
        with pytest.raises(ValueError, match=r"codes\.npy: item 4 has no codes, there are 4 rows \(2 such"):
            SemanticIds.from_npy(path, items=[0, 4, 3, -1])
        with pytest.raises(TypeError, match="items needs a list of integers, got <U1"):
            SemanticIds.from_npy(path, items=["3"])
        with pytest.raises(ValueError, match=r"codes\.npy: .* item 1 has none"):
            SemanticIds.from_npy(path)

    @pytest.mark.parametrize("content", [b"", b"codes", b"\x93NUMPY\x01\x00"])
    def test_a_foreign_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "codes.npy"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"codes\.npy: not a readable"):
            SemanticIds.from_npy(path)

    def test_files_that_hold_no_codes(self, tmp_path: Path) -> None:
        np.save(tmp_path / "floats.npy", np.zeros((3, 2)))
        with pytest.raises(TypeError, match=r"floats\.npy: codes needs integers"):
            SemanticIds.from_npy(tmp_path / "floats.npy")
        np.save(tmp_path / "objects.npy", np.array([[1], None], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"objects\.npy: not a readable"):
            SemanticIds.from_npy(tmp_path / "objects.npy")
        np.savez(tmp_path / "many.npz", codes=np.zeros((3, 2), dtype=int))
        with pytest.raises(ValueError, match=r"many\.npz: .* archive"):
            SemanticIds.from_npy(tmp_path / "many.npz")
        with pytest.raises(FileNotFoundError):
            SemanticIds.from_npy(tmp_path / "missing.npy")


class TestFiles:
    def test_come_back_as_they_were(self, tmp_path: Path) -> None:
        options = {"codebook_sizes": [5, 6, 8], "first_token": 11, "extra_level": True}
        ids = SemanticIds([[1, 2, -1], [0, 4, 7]], **options)
        ids.save(tmp_path / "ids")
        back = SemanticIds.load(tmp_path / "ids")
        assert back.extra_level and torch.equal(back.content_codes, ids.content_codes)
        assert torch.equal(back.codes, ids.codes)
        assert torch.equal(back.tokens, ids.tokens)
        assert (back.codebook_sizes, back.first_token) == (ids.codebook_sizes, ids.first_token)
        assert [path.name for path in tmp_path.iterdir()] == ["ids"]

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "ids"
        SemanticIds([[1, 2]]).save(path)
        before = path.read_bytes()

        def write_half(tensors: dict, target: Path, metadata: dict) -> None:
            Path(target).write_bytes(before[:20])
            raise OSError("disk full")

        monkeypatch.setattr(semantic_ids, "save_file", write_half)
        with pytest.raises(OSError, match="disk full"):
            SemanticIds([[3, 4]]).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "ids"
        SemanticIds([[1, 2], [3, 4]]).save(path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="not a file of semantic IDs"):
                SemanticIds.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"format": "gflowgr.PrefixTrie/1"},
            {"codebook_sizes": "[2, 2]"},
            {"codebook_sizes": "[9]"},
            {"codebook_sizes": '["9", "9"]'},
            {"codebook_sizes": "9, 9"},
            {"codebook_sizes": None},
            {"first_token": "three"},
            {"first_token": "1"},
        ],
    )
    def test_foreign_or_damaged_metadata_is_refused(self, tmp_path: Path, change: dict) -> None:
        path = tmp_path / "ids"
        metadata = {
            "format": "gflowgr.SemanticIds/1",
            "codebook_sizes": json.dumps([9, 9]),
            "first_token": "3",
        }
        codes = {"codes": torch.tensor([[1, 2], [3, 4]])}
        save_file(codes, path, metadata)
        assert SemanticIds.load(path).vocab_size == 21
        changed = {key: value for key, value in (metadata | change).items() if value is not None}
        save_file(codes, path, changed)
        with pytest.raises(ValueError, match="not a file of semantic IDs"):
            SemanticIds.load(path)

    def test_a_file_without_metadata_or_codes(self, tmp_path: Path) -> None:
        path = tmp_path / "ids"
        save_file({"codes": torch.tensor([[1]])}, path)
        with pytest.raises(ValueError, match="got None"):
            SemanticIds.load(path)
        metadata = {"format": "gflowgr.SemanticIds/1", "codebook_sizes": "[9]", "first_token": "3"}
        save_file({"tokens": torch.tensor([[1]])}, path, metadata)
        with pytest.raises(ValueError, match="not a file of semantic IDs"):
            SemanticIds.load(path)
        with pytest.raises(FileNotFoundError, match="missing"):
            SemanticIds.load(tmp_path / "missing")
