"""Writers against the model's own logits on one unpadded sequence at a time, without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BatchEncoding

from gflowgr.decoding import TreeWriter, evaluating, tree_writer
from gflowgr.static_cache import StaticLayer

VOCABULARY, START = 40, 0
RANGES = [(3, 9), (10, 21), (5, 30), (22, 39)]
LENGTHS = (5, 2, 7)
# A tree of paths: what each step writes, and which path of the step before it continues. The third step
# leaves one path, continues another twice and turns their order around.
TOKENS = ([3, 9, 6], [10, 21, 15, 12], [5, 30, 17, 8, 5])
PARENTS = ([0, 0, 0], [2, 0, 0, 2], [3, 3, 1, 0, 2])
# PEFT asks transformers for an attribute that its newest versions rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # An adapter on T5's head adapts the embeddings too, which is what the test wants.
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning"),
]

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 8,
    "decoder_start_token_id": START,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5,
    **{name: DECODER for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma")},
    "gemma2": DECODER | {"final_logit_softcapping": 2.0, "sliding_window": 32},
    "gemma3_text": DECODER | {"final_logit_softcapping": 2.0, "sliding_window": 32},
    "granite": DECODER | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": DECODER | {"logit_scale": 0.25},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": DECODER,
    # Not among the families whose heads are known: asked for its logits itself.
    "starcoder2": DECODER,
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 0},
    "phi": DECODER | {"num_key_value_heads": 4},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
}
# Decoders that would take a token's place in the cache for its position, or look back only so far.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": (FAMILIES["falcon"] | {"alibi": True}, "falcon with alibi"),
    "bloom": ({"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 4}, "takes position_ids"),
    "mpt": ({"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 1, "n_heads": 4}, "takes position_ids"),
    "bart": (
        {"vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 4}
        | {"is_decoder": True, "is_encoder_decoder": False},
        "takes position_ids",
    ),
    "openai-gpt": (
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 4},
        "takes past_key_values",
    ),
    "roberta": (
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"intermediate_size": 24, "is_decoder": True},
        "counts positions from its padding token on",
    ),
    "gpt_neo": (
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]]},
        "layers of local",
    ),
}


def build(
    family: str, *, tied: bool = True, attention: str = "sdpa", dtype: torch.dtype = torch.float64
) -> Any:
    options = FAMILIES[family] | {"tie_word_embeddings": tied}
    if family == "phi3":
        options |= {"original_max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model(family, **options)
    auto = transformers.AutoModelForSeq2SeqLM if "t5" in family else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        # Gemma 2's attention is soft-capped, which no fused kernel does.
        model = auto.from_config(config, attn_implementation="eager" if family == "gemma2" else attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(read: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, read))
    tokens, mask = torch.zeros(len(read), width, dtype=torch.long), torch.zeros(len(read), width).long()
    for row, values in enumerate(read):
        place = slice(width - len(values), width) if side == "left" else slice(0, len(values))
        tokens[row, place], mask[row, place] = torch.tensor(values), 1
    return {"input_ids": tokens, "attention_mask": mask}


def own_logits(model: Any, read: list[int], written: list[int]) -> Tensor:
    """(V,), of the token after `written`."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            decoded = torch.tensor([[START, *written]])
            return model(input_ids=torch.tensor([read]), decoder_input_ids=decoded, use_cache=False).logits[
                0, -1
            ]
        return model(input_ids=torch.tensor([read + written]), use_cache=False).logits[0, -1]


def paths_after(step: int) -> list[list[int]]:
    paths: list[list[int]] = [[]]
    for tokens, parents in zip(TOKENS[:step], PARENTS[:step], strict=True):
        paths = [[*paths[parent], token] for token, parent in zip(tokens, parents, strict=True)]
    return paths


def step(writer: TreeWriter, number: int, batch: int) -> Tensor:
    tokens, parents = torch.tensor(TOKENS[number]), torch.tensor(PARENTS[number])
    return writer.extend(tokens.expand(batch, -1), parents.expand(batch, -1))


def assert_own(model: Any, read: list[list[int]], logits: Tensor, depth: int) -> None:
    low, high = RANGES[depth]
    paths = paths_after(depth)
    assert logits.shape == (len(read), len(paths), high - low + 1)
    expected = torch.stack(
        [torch.stack([own_logits(model, row, path)[low : high + 1] for path in paths]) for row in read]
    )
    # Norms and rotations are taken in float32 whatever the dtype.
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


def assert_writes_as_the_model(model: Any, transformer: Any = None, inputs: Any = None) -> None:
    read = rows()
    writer = tree_writer(model, padded(read) if inputs is None else inputs, RANGES, capacity=12)
    transformer = model if transformer is None else transformer
    assert_own(transformer, read, writer.logits, 0)
    for number in range(3):
        assert_own(transformer, read, step(writer, number, len(read)), number + 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_as_its_own_forward(family: str, tied: bool) -> None:
    assert_writes_as_the_model(build(family, tied=tied))


@pytest.mark.parametrize("family", ["t5", "llama", "gemma2", "starcoder2"])
def test_attention_without_fused_kernels_writes_the_same(family: str) -> None:
    assert_writes_as_the_model(build(family, attention="eager"))


@pytest.mark.parametrize("family", ["t5", "mt5", "llama"])
def test_a_model_that_returns_tuples_by_default_writes(family: str) -> None:
    model = build(family)
    model.config.return_dict = False
    writer = tree_writer(model, padded(rows()), RANGES)
    logits = writer.logits, step(writer, 0, 3)
    model.config.return_dict = True
    for depth, found in enumerate(logits):
        assert_own(model, rows(), found, depth)


@pytest.mark.parametrize("family", ["t5", "llama", "starcoder2", "gpt2"])
def test_padding_may_stand_anywhere(family: str) -> None:
    model, read = build(family), rows()
    right = padded(read, "right")
    assert_writes_as_the_model(model, inputs=right)
    assert_writes_as_the_model(model, inputs=BatchEncoding(padded(read, "left")))
    if model.config.pad_token_id == 0:
        assert_writes_as_the_model(model, inputs=right["input_ids"])
    # Rows of one length need no mask, and get the model's own.
    alone = tree_writer(model, torch.tensor([read[0]]), RANGES)
    assert_own(model, read[:1], alone.logits, 0)
    assert_own(model, read[:1], step(alone, 0, 1), 1)


def test_a_model_that_pads_by_its_end_token_reads_all_of_bare_tokens() -> None:
    model = build("llama")
    model.config.pad_token_id = model.config.eos_token_id = 7
    read = [[4, 7, 5], [7, 7, 8]]
    assert_own(model, read, tree_writer(model, torch.tensor(read), RANGES).logits, 0)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("adapted", ["attention", "head"])
def test_adapters_are_heard(family: str, adapted: str) -> None:
    from peft import LoraConfig, get_peft_model

    names = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}[family]
    model = build(family, tied=False)
    plain = tree_writer(model, padded(rows()), RANGES).logits
    config = LoraConfig(r=2, target_modules=names if adapted == "attention" else ["lm_head"])
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    assert_writes_as_the_model(model, model.get_base_model())
    assert not torch.allclose(tree_writer(model, padded(rows()), RANGES).logits, plain, atol=1e-2)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_head_with_a_bias_or_a_hook_is_respected(family: str) -> None:
    model = build(family, tied=False)
    head = nn.Linear(16, VOCABULARY, dtype=torch.float64)
    model.set_output_embeddings(head)
    assert_writes_as_the_model(model)
    handle = head.register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    assert_writes_as_the_model(model)
    handle.remove()
    handle = model.register_forward_hook(_shifted)
    assert_writes_as_the_model(model)


def _shifted(module: Any, inputs: Any, output: Any) -> Any:
    output.logits = output.logits * 0.5 - 3
    return output


@pytest.mark.parametrize("family", ["t5", "llama", "gemma2"])
def test_bfloat16_is_near(family: str) -> None:
    exact, rounded = build(family), build(family, dtype=torch.bfloat16)
    inputs = padded(rows())
    ours = [tree_writer(model, inputs, RANGES, capacity=12) for model in (exact, rounded)]
    assert ours[1].logits.dtype == torch.bfloat16
    for number in range(3):
        expected, logits = (step(writer, number, 3) for writer in ours)
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=0.1 * scale)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_writer_wound_back_writes_another_branch(family: str) -> None:
    model, read = build(family), rows()
    # Room for one path a step: the cache has to grow, too.
    writer = tree_writer(model, padded(read), RANGES, capacity=3)
    start = writer.mark
    step(writer, 0, 3)
    first = writer.mark
    expected = step(writer, 1, 3)
    step(writer, 2, 3)
    writer.rewind(first)
    assert torch.equal(step(writer, 1, 3), expected)
    writer.rewind(start)
    step(writer, 0, 3)
    assert_own(model, read, step(writer, 1, 3), 2)


def test_the_prompt_runs_once_and_every_key_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    update = StaticLayer.update

    def counted(self: StaticLayer, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> Any:
        written.append((keys.shape[0], keys.shape[2]))
        before = None if self.keys is None else self.keys.data_ptr()
        result = update(self, keys, values, *args, **options)
        assert before in (None, self.keys.data_ptr()), "the cache moved"
        assert result[0].data_ptr() == self.keys.data_ptr(), "the cache was copied"
        return result

    monkeypatch.setattr(StaticLayer, "update", counted)
    for family, first in (("llama", [(3, 7)] * 2), ("t5", [(3, 1)] * 2)):
        written.clear()
        writer = tree_writer(build(family), padded(rows()), RANGES, capacity=12)
        assert written == first
        for number in range(3):
            step(writer, number, 3)
        assert written == first + [(3, 3)] * 2 + [(3, 4)] * 2 + [(3, 5)] * 2


def test_a_head_is_multiplied_by_the_tokens_of_the_depth_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tied=False)
    widths: list[int] = []
    linear = torch.nn.functional.linear

    def counted(states: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        widths.append(weight.shape[0])
        return linear(states, weight, bias)

    monkeypatch.setattr("gflowgr.heads.F.linear", counted)
    writer = tree_writer(model, padded(rows()), RANGES)
    step(writer, 0, 3)
    assert VOCABULARY not in widths and {7, 12} <= set(widths)


@pytest.mark.parametrize("family", OTHERS)
def test_decoders_whose_positions_are_not_position_ids_are_refused(family: str) -> None:
    options, why = OTHERS[family]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **options)
    )
    with pytest.raises(ValueError, match=why):
        tree_writer(model.eval(), torch.tensor([[3, 4, 5]]), RANGES)


def test_what_cannot_write_is_refused() -> None:
    llama, inputs = build("llama"), padded(rows())
    with pytest.raises(TypeError, match="model is a Linear"):
        tree_writer(nn.Linear(2, 2), inputs, RANGES)
    with pytest.raises(ValueError, match="language modelling head"):
        tree_writer(llama.model, inputs, RANGES)
    for wrong, kind, why in (
        ({"attention_mask": inputs["attention_mask"]}, ValueError, "needs input_ids"),
        (inputs["input_ids"].double(), TypeError, r"input_ids of torch\.float64"),
        ([[3, 4]], TypeError, "input_ids of list"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"shape \(3,\)"),
        (inputs | {"attention_mask": torch.ones(3, 2)}, ValueError, r"attention_mask of shape \(3, 2\)"),
        (inputs | {"attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 7)}, ValueError, "row 1"),
        (torch.full((1, 62), 5), ValueError, "need 65 positions, the model's max_position_embeddings is 64"),
    ):
        with pytest.raises(kind, match=why):
            tree_writer(llama, wrong, RANGES)
    windowed = build("mistral")
    windowed.config.sliding_window = 9
    with pytest.raises(ValueError, match="sliding_window is 9"):
        tree_writer(windowed, inputs, RANGES)
    # No layer slides, or not over anything.
    for window, layer_types in ((9, ["full_attention"] * 2), (0, None), (-1, None)):
        windowed.config.sliding_window, windowed.config.layer_types = window, layer_types
        tree_writer(windowed, inputs, RANGES)
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=16, d_model=8, encoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1
        )
    )
    with pytest.raises(ValueError, match="model is a bart"):
        tree_writer(bart.eval(), inputs, RANGES)
    for name, value, why in (
        ("_attn_implementation", "flash_attention_2", "attn_implementation 'flash_attention_2'"),
        ("layer_types", ["full_attention", "linear_attention"], "layers of linear_attention"),
    ):
        other = build("qwen3")
        setattr(other.config, name, value)
        with pytest.raises(ValueError, match=why):
            tree_writer(other, inputs, RANGES)
    writer = tree_writer(llama, inputs, RANGES)
    for number in range(3):
        step(writer, number, 3)
    with pytest.raises(ValueError, match="the last of 4 tokens"):
        step(writer, 0, 3)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_cache_is_refused_while_training(family: str) -> None:
    model = build(family)
    writer = tree_writer(model, padded(rows()), RANGES)
    model.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        tree_writer(model, padded(rows()), RANGES)
    with pytest.raises(RuntimeError, match="eval mode"):
        step(writer, 0, 3)


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(IndexError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise IndexError
    assert modes == {name: module.training for name, module in model.named_modules()}
