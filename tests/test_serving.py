"""Serving processors, driven as the engines' published protocols say, held against plain decoding.

`FakeVllm` keeps a persistent batch as vLLM's v1 engine does (slots are freed, filled by newcomers, condensed
by moves and reordered by swaps), `FakeVllmV2` slots as Model Runner V2 does, and `sglang_step` calls a
processor as SGLang's sampler does.
"""

from __future__ import annotations

import json
import pickle
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowgr import PrefixTrie
from gflowgr.serving import CatalogueConstraint, SGLangTrieProcessor, Wish, configured
from gflowgr.serving_vllm import TrieLogitsProcessor, TrieLogitsProcessorV2

ROWS = [[3, 5, 7], [3, 5, 8], [3, 6, -1], [4, 9, 7], [4, 9, 7], [10, -1, -1], [3, 5, 11]]
EOS, VOCABULARY = 1, 14


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrefixTrie:
    trie = PrefixTrie(ROWS)
    trie.save(tmp_path / "trie.safetensors")
    monkeypatch.setenv("GFLOWGR_TRIE", str(tmp_path / "trie.safetensors"))
    monkeypatch.setenv("GFLOWGR_EOS", str(EOS))
    return trie


def logits_after(request: int, written: list[int]) -> torch.Tensor:
    """A model that is a table: the logits of a request depend on what it is and has written."""
    seed = hash((request, *written)) % 2**31
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def allowed_after(written: list[int], left: set[int]) -> list[int]:
    """By search through the rows of the items that are left."""
    n = len(written)
    rows = [[token for token in row if token >= 0] for item, row in enumerate(ROWS) if item in left]
    follow = sorted({row[n] for row in rows if row[:n] == written and len(row) > n})
    return follow or [EOS]


ALL = set(range(len(ROWS)))


def expected(logits: torch.Tensor, written: list[int], left: set[int] = ALL) -> torch.Tensor:
    out = torch.full_like(logits, -torch.inf)
    allowed = allowed_after(written, left)
    out[allowed] = logits[allowed].double().log_softmax(0).to(logits.dtype)
    return out


def decode_plainly(request: int, left: set[int] = ALL) -> list[int]:
    written: list[int] = []
    while not written or written[-1] != EOS:
        written.append(int(expected(logits_after(request, written), written, left).argmax()))
    return written


ITEMS = st.lists(st.integers(0, len(ROWS) - 1), max_size=5)
# The parameters of a request, None for one that does not ask for the catalogue.
REQUESTS = st.none() | st.fixed_dictionaries({}, optional={"gflowgr_exclude": ITEMS, "gflowgr_allow": ITEMS})


def left_by(parameters: dict[str, list[int]]) -> set[int]:
    return set(parameters.get("gflowgr_allow", ALL)) - set(parameters.get("gflowgr_exclude", ()))


class Direction(Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


class BatchUpdate(NamedTuple):
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, list[int] | None, list[int]]]
    moved: list[tuple[int, int, Direction]]


class FakeVllm:
    """The persistent batch of vLLM's v1 engine around one processor, greedy."""

    def __init__(self, requests: list[dict[str, list[int]] | None], slots: int) -> None:
        self.processor = TrieLogitsProcessor(None, torch.device("cpu"), False)
        self.waiting = list(enumerate(requests))
        self.slots, self.batch = slots, []
        self.finished: dict[int, list[int]] = {}

    def run(self, draw: Any) -> None:
        while self.waiting or self.batch:
            self.step(draw)

    def step(self, draw: Any) -> None:
        batch = self.batch
        done = [slot for slot, (_, _, written) in enumerate(batch) if ends(written)]
        for slot in done:
            self.finished[batch[slot][0]] = batch[slot][2]
            batch[slot] = None
        added, moved = [], []
        free = sorted(done)
        while self.waiting and (free or len(batch) < self.slots):
            request, parameters = self.waiting.pop(0)
            slot = free.pop(0) if free else len(batch)
            extra_args = None if parameters is None else {"gflowgr": 1, **parameters}
            params = SimpleNamespace(extra_args=extra_args)
            TrieLogitsProcessor.validate_params(params)
            entry = (request, parameters, [])
            if slot == len(batch):
                batch.append(entry)
            else:
                batch[slot] = entry
            added.append((slot, params, None, entry[2]))
        # A slot that a newcomer takes is not reported as removed; the others are filled from the end.
        removed = list(free)
        while free:
            last = len(batch) - 1
            if last in free:
                free.remove(last)
                batch.pop()
                continue
            target = free.pop(0)
            batch[target] = batch.pop()
            moved.append((last, target, Direction.UNIDIRECTIONAL))
        if len(batch) > 1 and draw(st.booleans()):
            one, other = draw(st.permutations(range(len(batch))))[:2]
            batch[one], batch[other] = batch[other], batch[one]
            moved.append((one, other, Direction.SWAP))
        changed = added or removed or moved
        self.processor.update_state(BatchUpdate(len(batch), removed, added, moved) if changed else None)
        if not batch:
            return
        logits = torch.stack([logits_after(request, written) for request, _, written in batch])
        before = logits.clone()
        out = self.processor.apply(logits)
        for (_, parameters, written), row, raw in zip(batch, out, before, strict=True):
            want = raw if parameters is None else expected(raw, written, left_by(parameters))
            torch.testing.assert_close(row, want)
            written.append(int(row.argmax()))


def ends(written: list[int]) -> bool:
    return written[-1:] == [EOS] or len(written) == 5


@settings(max_examples=60)
@given(st.data(), st.lists(REQUESTS, min_size=1, max_size=9), st.integers(1, 4))
def test_vllm_batches(data: st.DataObject, requests: list[dict[str, list[int]] | None], slots: int) -> None:
    engine = FakeVllm(requests, slots)
    engine.run(data.draw)
    assert set(engine.finished) == set(range(len(requests)))
    for request, parameters in enumerate(requests):
        if parameters is not None:
            assert engine.finished[request] == decode_plainly(request, left_by(parameters))


class FakeVllmV2:
    """Slots of requests as vLLM's Model Runner V2 keeps them: recycled, the rows in any order."""

    PROMPT = 3

    def __init__(self, requests: list[dict[str, list[int]] | None], slots: int) -> None:
        tokens = torch.full((slots, self.PROMPT + 6), 5, dtype=torch.int32)
        prompts = torch.full((slots,), self.PROMPT, dtype=torch.int32)
        self.states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(gpu=prompts)
        )
        self.processor = TrieLogitsProcessorV2(None, self.states)
        self.waiting, self.slots = list(enumerate(requests)), slots
        self.running: dict[int, tuple[int, dict[str, list[int]] | None, list[int]]] = {}
        self.finished: dict[int, list[int]] = {}

    def step(self, draw: Any) -> None:
        for slot in [slot for slot, (_, _, written) in self.running.items() if ends(written)]:
            request, _, written = self.running.pop(slot)
            self.finished[request] = written
        while self.waiting and len(self.running) < self.slots:
            slot = draw(st.sampled_from(sorted(set(range(self.slots)) - set(self.running))))
            request, parameters = self.waiting.pop(0)
            params = SimpleNamespace(extra_args=None if parameters is None else {"gflowgr": 1, **parameters})
            TrieLogitsProcessorV2.validate_params(params)
            assert self.processor.add_request(slot, params) is (parameters is not None)
            self.running[slot] = (request, parameters, [])
        self.processor.apply_staged_writes()
        if not self.running:
            return
        order = draw(st.permutations(sorted(self.running)))
        lengths = [self.PROMPT + len(self.running[slot][2]) for slot in order]
        context = SimpleNamespace(
            idx_mapping_np=np.array(order, dtype=np.int32),
            expanded_idx_mapping=torch.tensor(order, dtype=torch.int32),
            pos=torch.tensor(lengths) - 1,
        )
        batch = [self.running[slot] for slot in order]
        logits = torch.stack([logits_after(request, written) for request, _, written in batch])
        before = logits.clone()
        out = self.processor.apply(logits, context)
        for slot, (_, parameters, written), row, raw in zip(order, batch, out, before, strict=True):
            want = raw if parameters is None else expected(raw, written, left_by(parameters))
            torch.testing.assert_close(row, want)
            written.append(int(row.argmax()))
            self.states.all_token_ids.gpu[slot, self.PROMPT + len(written) - 1] = written[-1]


@settings(max_examples=60)
@given(st.data(), st.lists(REQUESTS, min_size=1, max_size=9), st.integers(1, 4))
def test_vllm_batches_of_model_runner_v2(
    data: st.DataObject, requests: list[dict[str, list[int]] | None], slots: int
) -> None:
    engine = FakeVllmV2(requests, slots)
    while engine.waiting or engine.running:
        engine.step(data.draw)
    assert set(engine.finished) == set(range(len(requests)))
    for request, parameters in enumerate(requests):
        if parameters is not None:
            assert engine.finished[request] == decode_plainly(request, left_by(parameters))


def test_a_part_of_a_prompt_and_speculation_in_model_runner_v2() -> None:
    engine = FakeVllmV2([{}], 1)
    engine.processor.add_request(0, SimpleNamespace(extra_args={"gflowgr": 1}))
    slot = torch.zeros(1, dtype=torch.int32)
    context = SimpleNamespace(idx_mapping_np=slot.numpy(), expanded_idx_mapping=slot, pos=torch.tensor([0]))
    logits = torch.randn(1, VOCABULARY)
    raw = logits.clone()
    torch.testing.assert_close(engine.processor.apply(logits, context)[0], expected(raw[0], []))
    with pytest.raises(ValueError, match="logits has 2 rows for 1 requests"):
        engine.processor.apply(torch.randn(2, VOCABULARY), context)


def sglang_step(processor: Any, logits: torch.Tensor, mask: torch.Tensor, params: list[Any]) -> None:
    """What the sampler does with each processor of a batch."""
    chosen = [params[int(row)] for row in mask.nonzero(as_tuple=True)[0]]
    logits[mask] = processor(logits[mask], chosen)


def test_sglang_batches() -> None:
    requests = [SimpleNamespace(output_ids=[]) for _ in range(5)]
    mask = torch.tensor([True, False, True, True, True])
    wishes: list[dict[str, Any]] = [
        {},
        {},
        {"gflowgr_exclude": [0, 6, 3]},
        {"gflowgr_allow": [2, 5]},
        {"gflowgr_allow": []},
    ]
    text = SGLangTrieProcessor.to_str()
    while not all(ends(request.output_ids) for request in requests):
        live = [n for n, request in enumerate(requests) if not ends(request.output_ids)]
        logits = torch.stack([logits_after(n, requests[n].output_ids) for n in live])
        raw = logits.clone()
        # The server makes the processor from its text.
        processor = pickle.loads(bytes.fromhex(json.loads(text)["callable"]))()
        params = [{"__req__": requests[n], **wishes[n]} for n in live]
        sglang_step(processor, logits, mask[live], params)
        for n, row, before in zip(live, logits, raw, strict=True):
            want = expected(before, requests[n].output_ids, left_by(wishes[n])) if mask[n] else before
            torch.testing.assert_close(row, want)
            requests[n].output_ids.append(int(row.argmax()))
    for n in mask.nonzero().squeeze(1).tolist():
        assert requests[n].output_ids == decode_plainly(n, left_by(wishes[n]))


def test_a_step_reads_no_lists_again_and_copies_no_trie(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = configured()
    row: dict[str, Any] = {"gflowgr_exclude": [0, 6, 3]}
    first = constraint.wishes([row, {}])
    again = constraint.wishes([{}, row])
    assert first == again[::-1] == [constraint.wish(row), Wish()]
    assert again[1] is first[0]
    assert constraint.wishes([{"gflowgr_exclude": [5]}]) == [Wish((5,))]

    def moved(trie: PrefixTrie, device: object) -> PrefixTrie:
        raise AssertionError(f"the trie was asked to go to {device}")

    monkeypatch.setattr(PrefixTrie, "to", moved)
    constraint.log_probs(torch.zeros(1, VOCABULARY), [[]], first[:1])


def test_every_item_can_be_written_and_nothing_else() -> None:
    constraint = configured()
    written: list[list[int]] = [[]]
    finished = []
    while written:
        log_probs = constraint.log_probs(torch.randn(len(written), VOCABULARY), written)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(written)))
        grown = [
            [*path, int(token)]
            for path, row in zip(written, log_probs, strict=True)
            for token in row.isfinite().nonzero()
        ]
        finished += [path[:-1] for path in grown if path[-1] == EOS]
        written = [path for path in grown if path[-1] != EOS]
    leaves = {tuple(token for token in row if token >= 0) for row in ROWS}
    assert sorted(map(tuple, finished)) == sorted(leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_an_engine(dtype: torch.dtype) -> None:
    processor = TrieLogitsProcessor(None, torch.device("cpu"), False)
    params = SimpleNamespace(extra_args={"gflowgr": True})
    processor.update_state(BatchUpdate(1, [], [(0, params, [2, 2], [3])], []))
    logits = torch.randn(1, VOCABULARY, dtype=dtype)
    raw = logits.clone()
    out = processor.apply(logits)
    assert out.dtype == dtype
    torch.testing.assert_close(out[0], expected(raw[0].double(), [3]).to(dtype), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("written", [[EOS], [3, 5, 7, EOS], [3, 6, 2], [13], list(range(40))])
def test_off_the_trie_only_the_end_follows(written: list[int]) -> None:
    log_probs = configured().log_probs(torch.randn(1, VOCABULARY), [written])
    assert log_probs[0].isfinite().nonzero().flatten().tolist() == [EOS]
    assert log_probs[0, EOS] == 0


def test_forced_steps_are_certain_whatever_the_logits() -> None:
    log_probs = configured().log_probs(torch.full((1, VOCABULARY), -torch.inf), [[4]])
    assert log_probs[0, 9] == 0


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constraint = configured()
    with pytest.raises(ValueError, match=r"row 0 has written \[3, -1\]"):
        constraint.log_probs(torch.zeros(1, VOCABULARY), [[3, -1]])
    with pytest.raises(ValueError, match=r"logits has shape \(2, 14\), needs \(1, V\)"):
        constraint.log_probs(torch.zeros(2, VOCABULARY), [[]])
    with pytest.raises(ValueError, match="trie has the token 11"):
        constraint.log_probs(torch.zeros(1, 11), [[]])
    with pytest.raises(ValueError, match="eos is 20"):
        CatalogueConstraint(PrefixTrie(ROWS), 20).log_probs(torch.zeros(1, VOCABULARY), [[]])
    with pytest.raises(ValueError, match="eos is -1"):
        CatalogueConstraint(PrefixTrie(ROWS), -1)
    with pytest.raises(TypeError, match="eos is True"):
        CatalogueConstraint(PrefixTrie(ROWS), True)
    with pytest.raises(ValueError, match="gflowgr is 'yes', needs 0 or 1"):
        TrieLogitsProcessor.validate_params(SimpleNamespace(extra_args={"gflowgr": "yes"}))
    for name in ("gflowgr_exclude", "gflowgr_allow"):
        for items in ([7], [-1], 3, [True], ["a"]):
            with pytest.raises(ValueError, match=rf"{name} is .* needs a list of items, 0 \.\. 6"):
                TrieLogitsProcessor.validate_params(SimpleNamespace(extra_args={"gflowgr": 1, name: items}))
    with pytest.raises(ValueError, match="custom_param_list has 1 entries for 1 rows"):
        SGLangTrieProcessor()(torch.zeros(1, VOCABULARY), [{}])
    with pytest.raises(ValueError, match="custom_param_list has 0 entries for 1 rows"):
        SGLangTrieProcessor()(torch.zeros(1, VOCABULARY), None)
    monkeypatch.setenv("GFLOWGR_EOS", "end")
    with pytest.raises(ValueError, match="GFLOWGR_EOS is 'end'"):
        configured()
    monkeypatch.setenv("GFLOWGR_EOS", "1")
    monkeypatch.setenv("GFLOWGR_TRIE", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        configured()
    monkeypatch.delenv("GFLOWGR_TRIE")
    with pytest.raises(ValueError, match="GFLOWGR_TRIE is not set"):
        configured()


def test_threads_that_share_a_constraint_get_their_own_filters() -> None:
    """Another thread asks for its batch's filter just when this one has made its own."""
    waiting = [(Wish(exclude=(1,)),)]

    class Interrupted(CatalogueConstraint):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_filtered" and value[0] is not None and waiting:
                self.log_probs(torch.zeros(1, VOCABULARY), [[]], waiting.pop())

    trie = PrefixTrie([[0], [1]])
    found = Interrupted(trie, 5).log_probs(torch.zeros(1, VOCABULARY), [[]], (Wish(exclude=(0,)),))
    assert found[0, :2].tolist() == [-torch.inf, 0.0] and not waiting
