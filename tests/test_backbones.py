"""The backbones against transformers' own forward on one unpadded sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gflowgr.backbones import (
    DECODER_FAMILIES,
    GenerativeRecommender,
    add_lora,
    build_decoder,
    build_t5,
    from_pretrained,
)
from gflowgr.semantic_ids import BOS, EOS, PAD, SemanticIds

BACKBONES = ("t5", *DECODER_FAMILIES)
NUM_ITEMS, LEVELS = 24, 3
# PEFT asks transformers for an attribute that its newest versions rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def catalogue(
    unequal: bool = False, first_token: int = 3, levels: int = LEVELS, seed: int = 0
) -> SemanticIds:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (NUM_ITEMS, levels), generator=generator)
    if unequal:
        lengths = torch.randint(1, levels + 1, (NUM_ITEMS, 1), generator=generator)
        codes = codes.masked_fill(torch.arange(levels) >= lengths, -1)
    return SemanticIds(codes, codebook_sizes=4, first_token=first_token)


def tiny(backbone: str, semantic_ids: SemanticIds, **options: Any) -> GenerativeRecommender:
    shape = {
        "layers": 2,
        "d_model": 16,
        "heads": 2,
        "d_ff": 32,
        "history_length": 5,
        "dropout": 0.0,
    } | options
    if backbone == "t5":
        return build_t5(semantic_ids, d_kv=8, **shape).double()
    return build_decoder(semantic_ids, family=backbone, **shape).double()


HISTORY = torch.tensor([[3, 1, 4, 1, 5], [9, 2, -1, -1, -1], [-1, -1, -1, -1, -1], [6, 23, 0, -1, -1]])
TRAJECTORIES = torch.tensor([[7, 8, 7, 0], [23, 11, 2, -1], [5, 1, 12, 3], [20, 21, 22, 23]])


def plain(model: GenerativeRecommender, history: list[int], item: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, context state and hidden states of one item after one history, by the model's plain forward."""
    read = [int(t) for i in history for t in model.semantic_ids.tokens[i] if t >= 0]
    written = [int(t) for t in model.semantic_ids.tokens[item] if t >= 0][:-1]
    if model.is_encoder_decoder:
        output = model.transformer(
            input_ids=torch.tensor([[*read, EOS]]),
            decoder_input_ids=torch.tensor([[PAD, *written]]),
            output_hidden_states=True,
        )
        state = output.encoder_last_hidden_state[0].mean(0)
        return output.logits[0], state, output.decoder_hidden_states[-1][0]
    output = model.transformer(input_ids=torch.tensor([[BOS, *read, *written]]), output_hidden_states=True)
    states = output.hidden_states[-1][0]
    return output.logits[0, len(read) :], states[len(read)], states[len(read) :]


def assert_near(ours: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal but for rounding: these models take their norms in float32 whatever the dtype."""
    ours, expected = ours.detach(), expected.detach()
    limit = 3e-6 * max(float(expected.abs().max()), 1e-3)
    assert float((ours - expected).abs().max()) <= limit, f"{what}: {ours} is not {expected}"


def assert_same_state(ours: Any, theirs: Any) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def pairs(model: GenerativeRecommender, history: Tensor, trajectories: Tensor) -> list[tuple[Any, ...]]:
    """(row, column, length, plain's result) of every real trajectory."""
    found = []
    for row in range(history.shape[0]):
        read = [int(i) for i in history[row] if i >= 0]
        for column, item in enumerate(trajectories[row].tolist()):
            if item >= 0:
                logits, state, hidden = plain(model, read, item)
                found.append((row, column, len(logits), logits, state, hidden))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_forward_scores_as_one_plain_pass_per_trajectory_does(
    backbone: str, unequal: bool, attention: str
) -> None:
    model = tiny(backbone, catalogue(unequal), attention=attention)
    policy = model(HISTORY, TRAJECTORIES)
    assert policy.logits.shape == (4, 4, LEVELS, model.semantic_ids.vocab_size)
    assert policy.context.shape == (4, 16) and policy.hidden.shape == (4, 4, LEVELS, 16)
    weights = torch.randn(
        policy.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    ours, theirs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, column, length, logits, state, hidden in pairs(model, HISTORY, TRAJECTORIES):
        assert_near(policy.logits[row, column, :length], logits)
        assert_near(policy.hidden[row, column, :length], hidden)
        assert_near(policy.context[row], state)
        ours = ours + (weights[row, column, :length] * policy.logits[row, column, :length]).sum()
        theirs = theirs + (weights[row, column, :length] * logits).sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(ours, list(parameters.values()), retain_graph=True)
    expected = torch.autograd.grad(theirs, list(parameters.values()))
    for name, gradient, other in zip(parameters, gradients, expected, strict=True):
        assert_near(gradient, other, name)
        assert other.abs().max() > 0, name


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_items_of_one_token(backbone: str) -> None:
    model = tiny(backbone, SemanticIds(torch.arange(NUM_ITEMS).unsqueeze(1)))
    policy = model(HISTORY, TRAJECTORIES)
    for row, column, _, logits, _, _ in pairs(model, HISTORY, TRAJECTORIES):
        torch.testing.assert_close(policy.logits[row, column], logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_changes_nothing(backbone: str) -> None:
    model = tiny(backbone, catalogue(unequal=True))
    policy = model(HISTORY, TRAJECTORIES)
    scattered = torch.full((4, 9), -1)
    for row in range(4):
        real = HISTORY[row][HISTORY[row] >= 0]
        scattered[row, torch.tensor([0, 2, 3, 6, 8])[: len(real)]] = real
    other = model(scattered, TRAJECTORIES)
    alone = [model(HISTORY[row : row + 1], TRAJECTORIES[row : row + 1]) for row in range(4)]
    real = model.tokens(TRAJECTORIES) >= 0
    assert_near(policy.logits[real], other.logits[real])
    assert_near(policy.context, other.context)
    assert_near(policy.context, torch.cat([p.context for p in alone]))
    assert_near(policy.logits[real], torch.cat([p.logits for p in alone])[real])


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_only_the_latest_items_are_read(backbone: str) -> None:
    model = tiny(backbone, catalogue(), history_length=3)
    long = torch.tensor([[3, 1, 4, 1, 5, -1], [9, 2, 6, -1, -1, -1]])
    short = torch.tensor([[4, 1, 5], [9, 2, 6]])
    trajectories = torch.tensor([[1], [2]])
    assert torch.equal(model(long, trajectories).logits, model(short, trajectories).logits)
    assert not torch.equal(model(long[:, 1:], trajectories).logits, model(short[:, 1:], trajectories).logits)


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_a_context_is_read_once_whatever_the_number_of_trajectories(backbone: str) -> None:
    model = tiny(backbone, catalogue())
    seen: list[torch.Size] = []
    reader = model.transformer.get_encoder() if backbone == "t5" else model.transformer.get_input_embeddings()

    def record(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).shape)

    reader.register_forward_pre_hook(record, with_kwargs=True)
    model(HISTORY, TRAJECTORIES.repeat(1, 4))
    read = 1 + 5 * LEVELS
    assert seen == [torch.Size((4, read if backbone == "t5" else read + 16 * (LEVELS - 1)))]


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_whole_histories_score_every_item_as_its_own_window_does(family: str, unequal: bool) -> None:
    model = tiny(family, catalogue(unequal), history_length=6)
    items = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 23, -1, -1, -1], [7, -1, -1, -1, -1, -1]])
    policy = model(items=items)
    assert policy.logits.shape == (3, 6, LEVELS, model.semantic_ids.vocab_size)
    for row, column in (items >= 0).nonzero().tolist():
        logits, state, hidden = plain(model, items[row, :column].tolist(), int(items[row, column]))
        assert_near(policy.logits[row, column, : len(logits)], logits)
        assert_near(policy.hidden[row, column, : len(logits)], hidden)
        assert_near(policy.context[row, column], state)


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_gradient_checkpointing_changes_no_gradient(backbone: str) -> None:
    model = tiny(backbone, catalogue()).train()
    parameters = list(model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(HISTORY, TRAJECTORIES).logits.square().sum(), parameters)

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for gradient, other in zip(gradients(), expected, strict=True):
        assert_near(gradient, other)
    model.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_autocast_stays_near_full_precision(backbone: str) -> None:
    model = tiny(backbone, catalogue()).float().eval()
    exact = model(HISTORY, TRAJECTORIES).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(HISTORY, TRAJECTORIES).logits
    assert rounded.dtype == torch.bfloat16
    real = TRAJECTORIES >= 0
    assert (rounded.float() - exact)[real].abs().max() < 0.03 * exact[real].abs().max()


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_dropout_acts_in_training_only(backbone: str) -> None:
    model = tiny(backbone, catalogue(), dropout=0.4).train()
    assert not torch.equal(model(HISTORY, TRAJECTORIES).logits, model(HISTORY, TRAJECTORIES).logits)
    still = model.eval()(HISTORY, TRAJECTORIES).logits
    assert torch.equal(still, model(HISTORY, TRAJECTORIES).logits)
    torch.testing.assert_close(still, tiny(backbone, catalogue())(HISTORY, TRAJECTORIES).logits)


def test_a_decoder_drops_embeddings_and_what_blocks_add() -> None:
    model = tiny("llama", catalogue(), dropout=0.4).train()
    layer = model.transformer.get_decoder().layers[1]
    states = torch.ones(1, 200, 16, dtype=torch.float64)
    positions = model.transformer.get_decoder().rotary_emb(states, torch.arange(200).unsqueeze(0))
    for output in (
        model.transformer.get_input_embeddings()(torch.arange(3, 11).repeat(30)),
        layer.mlp(states),
        layer.self_attn(hidden_states=states, position_embeddings=positions, attention_mask=None)[0],
    ):
        assert 0.35 < (output == 0).double().mean() < 0.45


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_the_seed_alone_decides_the_weights(backbone: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = tiny(backbone, catalogue(), seed=1), tiny(backbone, catalogue(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    other = tiny(backbone, catalogue(), seed=2)
    for (name, value), (_, same), (_, differs) in zip(
        first.state_dict().items(), second.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(value, same)
        assert "norm" in name or "bias" in name or not torch.equal(value, differs)


def test_grouped_queries_and_default_sizes() -> None:
    model = build_decoder(catalogue(), layers=1, d_model=16, heads=4, key_value_heads=2)
    assert model.config.num_key_value_heads == 2 and model.config.intermediate_size == 64
    assert model(HISTORY, TRAJECTORIES).logits.shape[-1] == model.semantic_ids.vocab_size
    letter = build_t5(catalogue())
    assert (letter.config.num_layers, letter.config.d_model, letter.config.d_ff) == (4, 128, 1024)
    assert (letter.config.num_heads, letter.config.d_kv, letter.history_length) == (6, 64, 20)


def test_trie_and_tokens_follow_the_device() -> None:
    model = tiny("llama", catalogue())
    assert model.trie is model.trie and model.trie.device == torch.device("cpu")
    assert model.trie.fingerprint == model.semantic_ids.trie().fingerprint
    assert model.tokens(torch.tensor([[2, -1]])).tolist() == [
        [model.semantic_ids.tokens[2].tolist(), [-1] * 3]
    ]
    model.to("meta")
    assert model.trie.device.type == "meta"
    assert not any("trie" in key or "tokens" in key.split(".")[:1] for key in model.state_dict())


def pretrained(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind.startswith("t5"):
        config = transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            **({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"} if kind == "t5-1.1" else {}),
        )
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        config = transformers.AutoConfig.for_model(
            kind.removesuffix("-tied"),
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=7,
            eos_token_id=[8, 9],
            pad_token_id=None,
            tie_word_embeddings=kind.endswith("-tied"),
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


CHECKPOINTS = ("t5", "t5-1.1", "llama", "llama-tied", "qwen2")


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_pretrained_model_keeps_its_words_and_learns_codes(tmp_path: Path, kind: str) -> None:
    folder = pretrained(tmp_path / "base", kind)
    semantic_ids = catalogue(first_token=50)
    model = from_pretrained(folder, semantic_ids)
    auto = (
        transformers.T5ForConditionalGeneration
        if kind.startswith("t5")
        else transformers.AutoModelForCausalLM
    )
    old = auto.from_pretrained(folder)
    for ours, theirs in (
        (model.transformer.get_input_embeddings(), old.get_input_embeddings()),
        (model.transformer.get_output_embeddings(), old.get_output_embeddings()),
    ):
        assert ours.weight.shape[0] == semantic_ids.vocab_size == 62
        assert torch.equal(ours.weight[:50], theirs.weight)
    again = from_pretrained(folder, semantic_ids)
    assert_same_state(model, again)
    policy = model.double().eval()(HISTORY, TRAJECTORIES)
    assert policy.logits.shape == (4, 4, LEVELS, 62)
    if not kind.startswith("t5"):
        assert model.inputs(HISTORY)["input_ids"][0, 0] == 7
    with pytest.raises(ValueError, match="first_token=50"):
        from_pretrained(folder, catalogue())


def train_a_step(model: GenerativeRecommender) -> set[str]:
    """The parameters that a step changed."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(HISTORY, TRAJECTORIES).logits.square().mean().backward()
        optimizer.step()
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_lora_trains_adapters_and_new_embeddings_and_survives_a_checkpoint(tmp_path: Path, kind: str) -> None:
    semantic_ids = catalogue(first_token=50)
    model = from_pretrained(pretrained(tmp_path / "base", kind), semantic_ids).eval()
    before = model(HISTORY, TRAJECTORIES).logits
    assert add_lora(model, r=4) is model
    model.eval()
    torch.testing.assert_close(model(HISTORY, TRAJECTORIES).logits, before, rtol=0, atol=1e-5)
    changed = train_a_step(model)
    assert any("lora_A" in name for name in changed) and any("lora_B" in name for name in changed)
    embeddings = {name for name in changed if "lora_" not in name}
    assert embeddings and all(
        any(part in name for part in ("shared", "embed_tokens", "lm_head")) for name in embeddings
    )
    after = model(HISTORY, TRAJECTORIES).logits
    assert (after - before).abs().max() > 1e-4
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    for base_weights in (True, False):
        folder = tmp_path / f"saved-{base_weights}"
        model.save_pretrained(folder, base_weights=base_weights)
        assert (folder / "base").exists() == base_weights
        loaded = GenerativeRecommender.load(folder, semantic_ids).eval()
        torch.testing.assert_close(loaded(HISTORY, TRAJECTORIES).logits, after, rtol=0, atol=1e-6)
        assert {name for name, value in loaded.named_parameters() if value.requires_grad} == trainable
    frozen = GenerativeRecommender.load(tmp_path / "saved-True", trainable=False)
    assert not any("lora" in name for name, value in frozen.named_parameters() if value.requires_grad)
    (tmp_path / "saved-True" / "adapter_model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="adapter is not readable"):
        GenerativeRecommender.load(tmp_path / "saved-True")


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_lora_on_a_model_from_scratch_freezes_all_else(tmp_path: Path, backbone: str) -> None:
    model = add_lora(tiny(backbone, catalogue(), dropout=0.2).float(), target_modules=["q_proj", "q"])
    assert train_a_step(model.eval()) and all("lora_" in name for name in train_a_step(model))
    with pytest.raises(ValueError, match="base_weights"):
        model.save_pretrained(tmp_path / "saved", base_weights=False)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved")
    loaded = GenerativeRecommender.load(tmp_path / "saved").eval()
    torch.testing.assert_close(
        loaded(HISTORY, TRAJECTORIES).logits, model(HISTORY, TRAJECTORIES).logits, rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(loaded)


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_gradient_checkpointing_reaches_adapters_behind_frozen_embeddings(backbone: str) -> None:
    model = add_lora(tiny(backbone, catalogue()).float(), r=2).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(HISTORY, TRAJECTORIES).logits.square().sum().backward()
    touched = [
        name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()
    ]
    assert len([name for name in touched if "lora_B" in name]) == len(
        [name for name, _ in model.named_parameters() if "lora_B" in name]
    )


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_a_checkpoint_brings_back_the_model(tmp_path: Path, backbone: str) -> None:
    model = tiny(backbone, catalogue(), dropout=0.3, history_length=4).float().eval()
    folder = tmp_path / "runs" / "checkpoint"
    model.save_pretrained(folder)
    loaded = GenerativeRecommender.load(folder, catalogue()).eval()
    assert torch.equal(loaded(HISTORY, TRAJECTORIES).logits, model(HISTORY, TRAJECTORIES).logits)
    assert loaded.history_length == 4 and torch.equal(loaded.semantic_ids.codes, model.semantic_ids.codes)
    assert not torch.equal(
        loaded.train()(HISTORY, TRAJECTORIES).logits, loaded.train()(HISTORY, TRAJECTORIES).logits
    )
    assert GenerativeRecommender.load(folder, dtype=torch.float64).transformer.dtype == torch.float64
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    auto = transformers.AutoModelForSeq2SeqLM if backbone == "t5" else transformers.AutoModelForCausalLM
    assert torch.equal(
        auto.from_pretrained(folder).get_input_embeddings().weight,
        model.transformer.get_input_embeddings().weight,
    )


def test_a_gathered_state_is_saved_in_place_of_the_own_one(tmp_path: Path) -> None:
    model, other = tiny("llama", catalogue(), seed=1).float(), tiny("llama", catalogue(), seed=2).float()
    model.save_pretrained(tmp_path / "saved", state_dict=other.state_dict())
    loaded = GenerativeRecommender.load(tmp_path / "saved")
    assert_same_state(loaded, other)


def test_saving_again_replaces_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    tiny("llama", catalogue(), seed=1).save_pretrained(folder)
    second = tiny("llama", catalogue(), seed=2)
    second.save_pretrained(folder)
    assert (folder / "trainer_state.json").read_text() == "{}"
    loaded = GenerativeRecommender.load(folder)
    assert_same_state(loaded, second)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    first = tiny("llama", catalogue(), seed=1)
    first.save_pretrained(folder)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(SemanticIds, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny("llama", catalogue(), seed=2).save_pretrained(folder)
    monkeypatch.undo()
    loaded = GenerativeRecommender.load(folder)
    assert_same_state(loaded, first)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_another_trie_is_refused(tmp_path: Path) -> None:
    tiny("llama", catalogue()).save_pretrained(tmp_path / "saved")
    other = catalogue(seed=1)
    with pytest.raises(ValueError, match="checkpoint of another trie"):
        GenerativeRecommender.load(tmp_path / "saved", other)
    other.save(tmp_path / "saved" / "semantic_ids.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        GenerativeRecommender.load(tmp_path / "saved")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        GenerativeRecommender.load(tmp_path / "nowhere")
    folder = tmp_path / "saved"
    model = tiny("llama", catalogue()).float()
    model.save_pretrained(folder)
    weights, description = folder / "model.safetensors", folder / "gflowgr.json"
    whole, text = weights.read_bytes(), description.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not readable"):
        GenerativeRecommender.load(folder)
    weights.write_bytes(whole)
    for bad, why in (("{", "not a readable"), ("[]", "format"), ('{"format": "other"}', "format")):
        description.write_text(bad)
        with pytest.raises(ValueError, match=why):
            GenerativeRecommender.load(folder)
    lacking = {key: value for key, value in json.loads(text).items() if key != "history_length"}
    description.write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="'history_length' is missing"):
        GenerativeRecommender.load(folder)
    description.write_text(text)
    state = {key: value for key, value in model.model.state_dict().items() if "norm" not in key}
    model.model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match="weights are missing"):
        GenerativeRecommender.load(folder)


def test_bad_arguments_name_themselves() -> None:
    model = tiny("llama", catalogue())
    history, trajectories = HISTORY, TRAJECTORIES
    for arguments, error, why in (
        ((None, None), ValueError, "history and trajectories"),
        ((history, None), ValueError, "history and trajectories"),
        ((history.float(), trajectories), TypeError, "history is torch.float32"),
        ((history.tolist(), trajectories), TypeError, "history is list"),
        ((history[0], trajectories), ValueError, "history has shape"),
        ((history[:, :0], trajectories), ValueError, "history has shape"),
        ((history, trajectories[:3]), ValueError, "trajectories has 3 rows"),
        ((history, trajectories + NUM_ITEMS), ValueError, rf"needs 0 \.\. {NUM_ITEMS - 1}, or -1"),
    ):
        with pytest.raises(error, match=why):
            model(*arguments)
    with pytest.raises(ValueError, match="items came with"):
        model(history, items=history)
    with pytest.raises(ValueError, match="decoder-only"):
        tiny("t5", catalogue())(items=history)
    with pytest.raises(ValueError, match="1000 columns"):
        model(items=torch.zeros(1, 1000, dtype=torch.long))


def test_models_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    semantic_ids = catalogue()
    model = tiny("llama", semantic_ids).model
    with pytest.raises(TypeError, match="model is a Linear"):
        GenerativeRecommender(torch.nn.Linear(2, 2), semantic_ids)
    with pytest.raises(TypeError, match="semantic_ids is a Tensor"):
        GenerativeRecommender(model, semantic_ids.codes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocabulary of 15"):
        GenerativeRecommender(model, catalogue(first_token=9))
    with pytest.raises(ValueError, match="history_length is 0"):
        GenerativeRecommender(model, semantic_ids, history_length=0)
    with pytest.raises(ValueError, match="the model has 2048"):
        GenerativeRecommender(model, semantic_ids, history_length=700)
    with pytest.raises(ValueError, match="dropout is 1"):
        GenerativeRecommender(model, semantic_ids, dropout=1.0)
    bart = transformers.BartConfig(
        vocab_size=15,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    with pytest.raises(ValueError, match="model is a bart"):
        GenerativeRecommender(transformers.BartForConditionalGeneration(bart), semantic_ids)
    with pytest.raises(ValueError, match="family is 'gpt5'"):
        build_decoder(semantic_ids, family="gpt5")
    with pytest.raises(ValueError, match="multiple of heads"):
        build_decoder(semantic_ids, d_model=30, heads=4)
