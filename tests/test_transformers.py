"""SparseK attention in Hugging Face transformers: what models compute, how they are loaded, what is refused."""

from __future__ import annotations

import copy
import pathlib
import pickle
import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers_case import FAMILIES, PADDINGS, attentions, batch_of, build, real_logits, tokens

from xformers_sparsek import SparseKBias, SparseKScorer, sparsek_attention
from xformers_sparsek.integrations.transformers import (
    from_pretrained,
    parameter_groups,
    sparsify,
    train_scorers_only,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_PADDING = pytest.mark.parametrize("padding", PADDINGS)


# ------------------------------------------------------------------------------------------------------------- values


@EVERY_FAMILY
@EVERY_PADDING
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("num_keys", "window"), [(24, 0), (1, 24)])
def test_equals_the_stock_model_where_every_key_is_kept(family, padding, implementation, num_keys, window, device):
    model = build(family, implementation=implementation).to(device)
    batch = batch_of(padding, device)
    with torch.no_grad():
        expected = real_logits(model, batch)
        actual = real_logits(sparsify(model, num_keys=num_keys, window=window), batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@EVERY_FAMILY
@EVERY_PADDING
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"hard": True, "window": 2}], ids=str)
def test_padding_changes_nothing(family, padding, options, device):
    """Each row of a batch gives what its real tokens give alone, and selection does select.

    In float64, since a key with a small gate and a large logit makes much of the last bits of its score.
    """
    model = sparsify(build(family).to(device, torch.float64), num_keys=3, **options)
    batch = batch_of(padding, device)
    with torch.no_grad():
        logits = model(**batch).logits
        for i, (first, last) in enumerate(PADDINGS[padding]):
            alone = model(batch["input_ids"][i : i + 1, first:last]).logits[0]
            torch.testing.assert_close(logits[i, first:last], alone, rtol=0, atol=1e-10 * logits.abs().max().item())
        model.set_attn_implementation("sdpa")
        dense = real_logits(model, batch)
    assert (dense - logits[batch["attention_mask"].bool()]).abs().max() > 0.1 * logits.abs().max()


def recorded(model: PreTrainedModel, batch: dict[str, Tensor], monkeypatch) -> list[tuple[Tensor, ...]]:
    """Query, key, value, scores and output of each layer's attention, and its hidden states, when the model runs."""
    calls, hidden_states, inner = [], [], ALL_ATTENTION_FUNCTIONS["sparsek"]

    def record(module, query, key, value, mask, **kwargs):
        out = inner(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, kwargs["sparsek_scores"], out[0]))
        return out

    def keep(module, args, kwargs):
        hidden_states.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sparsek", record)
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in attentions(model)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    return [(*call, hidden) for call, hidden in zip(calls, hidden_states, strict=True)]


@EVERY_FAMILY
@pytest.mark.parametrize("options", [{"window": 2}, {"hard": True}], ids=str)
def test_every_layer_computes_the_documented_attention(family, options, device, monkeypatch):
    """A dense softmax over the bias that the scores of the layer's own hidden states give."""
    model = sparsify(build(family).to(device), num_keys=4, **options)
    calls = recorded(model, {"input_ids": tokens().to(device)}, monkeypatch)
    assert len(calls) == 3
    for attention, (query, key, value, scores, out, hidden) in zip(attentions(model), calls):
        torch.testing.assert_close(scores, attention.sparsek_scorer(hidden))
        batch, heads, length, _ = query.shape
        bias = SparseKBias(scores, 4, **options).materialize((batch, heads, length, length), torch.float32, device)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        expected = (query @ key.mT * attention.scaling + bias).softmax(-1) @ value
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_outputs_at_padding_are_zero(family, monkeypatch):
    model = sparsify(build(family), num_keys=4, window=2)
    batch = batch_of("both")
    for *_, out, _ in recorded(model, batch, monkeypatch):
        real = batch["attention_mask"].bool()
        assert (out[~real] == 0).all()
        assert (out[real] != 0).any(-1).all()


def test_masks_take_no_quadratic_memory():
    """Where all layers are sparse; dense ones need causality in theirs."""
    real = batch_of("left")["attention_mask"].bool()
    for layers, shape in ((None, (3, 1, 1, 24)), ([0], (3, 1, 24, 24))):
        config = sparsify(build("llama"), num_keys=4, layers=layers).config
        sizes = {"batch_size": 3, "q_length": 24, "kv_length": 24, "config": config}
        make = transformers.AttentionMaskInterface()["sparsek"]
        assert make(**sizes, attention_mask=real).shape == shape
        assert make(**sizes, attention_mask=real | True) is None
        assert make(**sizes) is None


@EVERY_FAMILY
def test_rows_without_tokens(family):
    model = sparsify(build(family), num_keys=4, window=2)
    batch = batch_of("left")
    with torch.no_grad():
        before = model(**batch).logits
        batch["attention_mask"][1] = 0
        after = model(**batch).logits
        batch["attention_mask"][:] = 0
        assert model(**batch).logits.isfinite().all()
    torch.testing.assert_close(after[0, 7:], before[0, 7:])
    torch.testing.assert_close(after[2, 23:], before[2, 23:])
    assert after.isfinite().all()


@EVERY_FAMILY
def test_scores_follow_position_ids(family, monkeypatch):
    """The slope of the scores counts the positions that the model is given."""
    model = sparsify(build(family), num_keys=4, slope=3.0, slope_ratio=1.0, slope_length=10)
    inputs = tokens()
    calls = [
        recorded(model, {"input_ids": inputs, "position_ids": torch.arange(24)[None] + start}, monkeypatch)
        for start in (0, 50)
    ]
    first, later = (layers[0][3] for layers in calls)
    if family != "gpt2":  # whose hidden states have the positions in them
        torch.testing.assert_close(later, first + 15.0)
    for (*_, scores, _, hidden), attention in zip(calls[1], attentions(model)):
        torch.testing.assert_close(scores, attention.sparsek_scorer(hidden, torch.arange(50, 74)))


def test_settings_may_be_changed():
    model = sparsify(build("llama"), num_keys=24)
    expected = sparsify(build("llama"), num_keys=2, window=1, hard=True, slope_length=24)
    expected.load_state_dict(model.state_dict())
    model.config.sparsek.update(num_keys=2, window=1, hard=True)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_scorers_start_as_asked():
    model = sparsify(build("llama"), num_keys=4, spread=2.0, slope=-1.5, slope_ratio=2.0, slope_length=7)
    for attention in attentions(model):
        scorer = attention.sparsek_scorer
        assert (scorer.gain == 2.0).all() and scorer.slope.tolist() == [-1.5, -0.75] and scorer.slope_length == 7
        assert scorer.weight.shape == (2, 32)
    assert sparsify(build("llama"), num_keys=4).config.sparsek["slope_length"] == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = sparsify(build("llama").to(dtype), num_keys=24, window=2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    batch = batch_of("left")
    sparse = real_logits(model, batch)
    model.set_attn_implementation("sdpa")
    dense = real_logits(model, batch)
    assert sparse.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    assert (sparse - dense).abs().max() < tolerance * dense.abs().max()


def test_autocast():
    """Query and key leave the rotation in float32 there, value is of the lower precision."""
    model = sparsify(build("llama"), num_keys=24, window=2)
    batch = batch_of("left")
    exact = real_logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = real_logits(model, batch)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().max() < 0.1 * exact.abs().max()


# ------------------------------------------------------------------------------------------------------ layers of both


@EVERY_FAMILY
@EVERY_PADDING
def test_chosen_layers(family, padding):
    """Layers that were not chosen have no scorer and attend densely."""
    model = build(family)
    batch = batch_of(padding)
    dense = real_logits(model, batch)
    sparsify(model, num_keys=24, layers=[2, 0])
    assert model.config.sparsek["layers"] == [0, 2]
    assert [hasattr(attention, "sparsek_scorer") for attention in attentions(model)] == [True, False, True]
    torch.testing.assert_close(real_logits(model, batch), dense, rtol=0, atol=1e-5 * dense.abs().max().item())

    model.config.sparsek["num_keys"] = 2
    mixed = model(**batch).logits
    assert (mixed[batch["attention_mask"].bool()] - dense).abs().max() > 0.1 * dense.abs().max()
    for i, (first, last) in enumerate(PADDINGS[padding]):
        alone = model(batch["input_ids"][i : i + 1, first:last]).logits[0]
        torch.testing.assert_close(mixed[i, first:last], alone, rtol=0, atol=1e-5 * dense.abs().max().item())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_beside_layers_with_a_sliding_window(family, padding):
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = build(family, **options)
    batch = batch_of(padding)
    dense = real_logits(model, batch)
    with pytest.raises(ValueError, match=r"layers \[1, 2\] have a sliding window of 4 tokens"):
        sparsify(model, num_keys=24)
    sparsify(model, num_keys=24, layers=[0])
    torch.testing.assert_close(real_logits(model, batch), dense, rtol=0, atol=1e-5 * dense.abs().max().item())
    full = build(family)
    full.load_state_dict(model.state_dict(), strict=False)
    assert (real_logits(full, batch) - dense).abs().max() > 0.1 * dense.abs().max()


# ---------------------------------------------------------------------------------------------------- saving, copying


@EVERY_FAMILY
@pytest.mark.parametrize("options", [{}, {"layers": [1], "window": 2, "hard": True, "slope_length": 5}], ids=str)
def test_saved_and_loaded(family, options, tmp_path):
    model = sparsify(build(family), num_keys=3, **options)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.sparsek == model.config.sparsek
    assert loaded.config._attn_implementation == "sparsek"
    assert not loaded.training
    batch = batch_of("left")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    # Once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(again.state_dict(), loaded.state_dict(), check_dtype=False, rtol=1e-2, atol=1e-2)


def test_loaded_by_transformers_alone(tmp_path):
    """The checkpoint serves as a dense model, too; it does not pass for a sparse one without its scorers."""
    model = sparsify(build("llama"), num_keys=3)
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(dense(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="load the model with from_pretrained from xformers_sparsek"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparsek")(tokens())


def test_checkpoints_that_cannot_be_loaded(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no sparsek block"):
        from_pretrained(tmp_path / "dense")

    model = sparsify(build("llama"), num_keys=3)
    weights = {name: x for name, x in model.state_dict().items() if "1.self_attn.sparsek_scorer.gain" not in name}
    model.save_pretrained(tmp_path / "incomplete", state_dict=weights)
    with pytest.raises(ValueError, match=r"no weights model.layers.1.self_attn.sparsek_scorer.gain$"):
        from_pretrained(tmp_path / "incomplete")

    transformers.OPTConfig(sparsek={}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'opt' is none of gpt2, llama"):
        from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copy_of, tmp_path):
    sparsify(build("llama"), num_keys=3).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    twin = copy_of(model)
    expected = model(tokens()).logits
    assert torch.equal(twin(tokens()).logits, expected)
    with torch.no_grad():
        attentions(twin)[0].sparsek_scorer.weight.neg_()
    assert not torch.equal(twin(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, expected)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"num_keys": 0}, ["num_keys must be at least 1"]),
        ({"num_keys": 2.5, "window": -1}, ["num_keys must be an integer", "window must be at least 0"]),
        ({"hard": 1, "layers": [0, 3]}, ["hard must be True or False", "different indices from 0 to 2"]),
        ({"layers": []}, ["at least one"]),
        ({"layers": [1, 1]}, ["different"]),
        ({"layers": [True]}, ["indices"]),
    ],
    ids=str,
)
def test_bad_arguments(changes, reasons):
    model = build("llama")
    names = set(model.state_dict())
    with pytest.raises(ValueError) as refusal:
        sparsify(model, **{"num_keys": 4} | changes)
    for reason in reasons:
        assert reason in str(refusal.value)
    with pytest.raises(ValueError, match="spread > 0"):
        sparsify(model, num_keys=4, spread=-1.0)
    # A refusal leaves the model as it was.
    assert set(model.state_dict()) == names
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "sparsek")


def test_models_that_are_not_supported():
    with pytest.raises(ValueError, match="'opt' is none of gpt2, llama, mistral, qwen2, qwen3"):
        sparsify(transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL_OPT)), num_keys=4)
    with pytest.raises(ValueError, match="must be a transformers model, got Linear"):
        sparsify(torch.nn.Linear(2, 2), num_keys=4)
    with pytest.raises(ValueError, match="must be a LlamaForCausalLM"):
        sparsify(build("llama").model, num_keys=4)
    with pytest.raises(ValueError, match="it has scorers already"):
        sparsify(sparsify(build("llama"), num_keys=4), num_keys=4)
    with pytest.raises(ValueError, match="its attention is not causal"):
        sparsify(build("llama", is_causal=False), num_keys=4)
    with pytest.raises(ValueError, match="it has cross-attention"):
        sparsify(build("gpt2", add_cross_attention=True), num_keys=4)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\] have a sliding window of 8 tokens.*sliding_window=None"):
        sparsify(build("mistral", sliding_window=8), num_keys=4)
    with pytest.raises(ValueError, match="it has no scorers: call sparsify first"):
        train_scorers_only(build("llama"))
    with pytest.raises(ValueError, match="it has no scorers: call sparsify first"):
        parameter_groups(build("llama"), lr=1e-3, scorer_lr=1e-1)
    with pytest.raises(ValueError) as refusal:
        sparsify(build("gpt2", add_cross_attention=True, is_causal=False), num_keys=0)
    for reason in ("not causal", "cross-attention", "num_keys must be at least 1"):
        assert reason in str(refusal.value)


SMALL_OPT = {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_model_without_scorers():
    with pytest.raises(ValueError, match="the model has no scorers: call sparsify"):
        build("llama", implementation="sparsek")(tokens())


def test_packed_sequences():
    """Recognised by transformers from positions that start again."""
    model = sparsify(build("llama"), num_keys=4)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with pytest.raises(ValueError, match="the mask is not causal alone: packed sequences"):
        model(tokens(1), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("layers", [None, [0]])
def test_masks_of_ones_own(layers):
    model = sparsify(build("llama"), num_keys=4, window=2, layers=layers)
    batch = batch_of("left")
    real = batch["attention_mask"].bool()
    mask = (torch.ones(24, 24, dtype=torch.bool).tril() & real[:, None]).unsqueeze(1)
    expected = real_logits(model, batch)
    actual = model(**batch | {"attention_mask": mask}).logits[real]
    torch.testing.assert_close(actual, expected)
    other = mask.clone()
    other[1, 0, 20, 3] = False
    with pytest.raises(ValueError, match="the mask is not causality and padding alone"):
        model(**batch | {"attention_mask": other})
    with pytest.raises(ValueError, match="the mask must be boolean of shape"):
        model(**batch | {"attention_mask": torch.where(mask, 0.0, -torch.inf)})


def test_dropout():
    """Only of the attention weights, and only in training."""
    for family, options in (("llama", {"attention_dropout": 0.25}), ("gpt2", {"attn_pdrop": 0.25})):
        model = sparsify(build(family, **options), num_keys=4)
        model(tokens())
        with pytest.raises(ValueError, match=r"attention dropout of 0\.25 in training"):
            model.train()(tokens())
    sparsify(build("gpt2", resid_pdrop=0.25), num_keys=4).train()(tokens())


def test_what_other_models_ask_for():
    model = sparsify(build("llama"), num_keys=4)
    module = attentions(model)[0]
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    scores = torch.randn(1, 6, 2)
    attend = ALL_ATTENTION_FUNCTIONS["sparsek"]
    out, weights = attend(module, query, key, key, None, scaling=0.5, sparsek_scores=scores, softcap=None)
    expected = sparsek_attention(*(x.transpose(1, 2) for x in (query, key, key)), scores, 4, scale=0.5)
    assert torch.equal(out, expected) and weights is None
    asked = {
        "sliding_window": 4,
        "softcap": 30.0,
        "s_aux": torch.zeros(4),
        "output_attentions": True,
        "cu_seq_lens_q": torch.tensor([0, 6]),
        "is_causal": False,
    }
    with pytest.raises(ValueError) as refusal:
        attend(module, query, key, key, None, dropout=0.1, scaling=0.5, sparsek_scores=scores, **asked)
    for reason in (
        "a sliding window cannot",
        "soft-capped logits cannot",
        "attention sinks cannot",
        "attention weights as an output cannot",
        "packed sequences cannot",
        "is not causal",
        "dropout of 0.1",
    ):
        assert reason in str(refusal.value)


def test_attention_weights_as_an_output():
    model = sparsify(build("llama"), num_keys=4)
    with pytest.raises(ValueError, match="attention weights as an output cannot be had"):
        model(tokens(), output_attentions=True)


def test_scorers_are_those_of_the_package():
    model = sparsify(build("gpt2"), num_keys=4)
    assert [type(attention.sparsek_scorer) for attention in attentions(model)] == [SparseKScorer] * 3
    assert attentions(model)[0].sparsek_scorer.weight.shape == (4, 32)


def test_example_in_the_readme(tmp_path, monkeypatch, capsys):
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?integrations.*?)```", readme.partition("## Hugging Face")[2], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out == "torch.Size([2, 320])\n"
