"""Generation by transformers models with SparseK attention, with caches that keep everything and that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.utils import GenerateOutput
from transformers_case import FAMILIES, batch_of, build, tokens

from xformers_sparsek.integrations.transformers import SparseKGenerationCache, sparsify

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
PATTERNS = [{"window": 3}, {}, {"hard": True, "window": 1}, {"window": 2, "layers": [1]}, {"layers": [0, 2]}]
CACHES = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    # Room for every key, since all of them may have gates above 0.
    "SparseKGenerationCache": lambda config: SparseKGenerationCache(config, capacity=64),
}
EVERY_CACHE = pytest.mark.parametrize("cache", CACHES)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def prompt(padding: str) -> dict[str, Tensor]:
    batch = batch_of(padding)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> GenerateOutput:
    # No stop token: sequences have the same length then, whatever the weights.
    return model.generate(**inputs, **{**GREEDY, "eos_token_id": None, **options})


def check_equal(actual: GenerateOutput, expected: GenerateOutput) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    logits, exact = torch.stack(actual.logits), torch.stack(expected.logits)
    # The gate of a key that is about to be dropped is a small difference of scores.
    torch.testing.assert_close(logits, exact, rtol=0, atol=3e-4 * exact.abs().max().item())


@EVERY_FAMILY
@EVERY_CACHE
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "both"])
def test_a_cache_changes_nothing(family, cache, pattern, padding):
    """Greedy search gives the tokens and logits of full forward passes over everything so far."""
    model = sparsify(build(family), num_keys=4, **pattern)
    inputs = prompt(padding)
    expected = generate(model, inputs, use_cache=False)
    check_equal(generate(model, inputs, past_key_values=CACHES[cache](model.config)), expected)
    model.set_attn_implementation("sdpa")
    assert not torch.equal(generate(model, inputs, use_cache=False).sequences, expected.sequences)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@EVERY_CACHE
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
    ],
    ids=str,
)
def test_beams_and_samples(family, cache, options):
    model = sparsify(build(family), num_keys=4, window=3)
    results = []
    for past in ({"use_cache": False}, {"past_key_values": CACHES[cache](model.config)}):
        torch.manual_seed(5)
        results.append(generate(model, prompt("left"), **options, **past).sequences)
    assert torch.equal(*results)


@EVERY_FAMILY
@EVERY_CACHE
def test_texts_that_stop_early(family, cache):
    model = sparsify(build(family), num_keys=4, window=3)
    expected = generate(model, prompt("left"), use_cache=False)
    stop = expected.sequences[0, 24 + 3].item()
    expected = generate(model, prompt("left"), use_cache=False, eos_token_id=stop)
    past = CACHES[cache](model.config)
    check_equal(generate(model, prompt("left"), past_key_values=past, eos_token_id=stop), expected)


@pytest.mark.parametrize("layers", [None, [0], [1, 2]], ids=str)
@EVERY_CACHE
def test_several_tokens_at_a_time(cache, layers):
    """A prompt in parts, as in a conversation, and a cache that starts over."""
    model = sparsify(build("llama"), num_keys=4, window=3, layers=layers)
    inputs = tokens(2, 40)
    past = CACHES[cache](model.config)
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
        for _ in range(2):
            parts = [model(part, past_key_values=past).logits for part in inputs.split([17, 1, 9, 13], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
            assert past.get_seq_length() == 40
            if cache == "DynamicCache":
                break  # not every version of transformers empties it on reset
            past.reset()
            assert past.get_seq_length() == 0


@EVERY_CACHE
@pytest.mark.parametrize("layers", [[0], [2], [0, 2]], ids=str)
def test_beside_layers_with_a_sliding_window(cache, layers):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = build("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    sparsify(model, num_keys=4, window=3, layers=layers)
    for padding in ("none", "left"):
        expected = generate(model, prompt(padding), use_cache=False)
        check_equal(generate(model, prompt(padding), past_key_values=CACHES[cache](model.config)), expected)


@pytest.mark.parametrize("past", [None, DynamicCache], ids=["no cache given", "layers made when needed"])
def test_caches_by_default(past):
    model = sparsify(build("llama"), num_keys=4, window=3)
    expected = generate(model, prompt("left"), use_cache=False)
    check_equal(generate(model, prompt("left"), past_key_values=past and past()), expected)


@pytest.mark.parametrize("hard", [False, True])
def test_memory_does_not_grow(hard):
    """With hard selection the default capacity is exact; with soft selection and close scores, drops are counted."""
    model = sparsify(build("llama"), num_keys=4, window=3, hard=hard, spread=0.25, slope=0.1)
    past = SparseKGenerationCache(model.config)
    assert past.overflow == {}
    sizes = []
    for length in (10, 60):
        found = generate(model, {"input_ids": tokens(2, length)}, past_key_values=past, max_new_tokens=30)
        sizes.append([layer.cache.nbytes for layer in past.layers])
        if hard:
            expected = generate(model, {"input_ids": tokens(2, length)}, use_cache=False, max_new_tokens=30)
            check_equal(found, expected)
        assert [count.shape for count in past.overflow.values()] == [(2, 2)] * 3
        assert (sum(count.sum() for count in past.overflow.values()) == 0) == hard
        past.reset()
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("family", "backend"), [*((family, "aot_eager") for family in FAMILIES), ("llama", "inductor")], ids=str
)
def test_compiled(family, backend):
    """One graph makes every token but the first of each text, whatever the padding, and for another cache as well."""
    model = sparsify(build(family), num_keys=4, window=3)
    compiled = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend=backend)
    compiled._compile_all_devices = True
    past = SparseKGenerationCache(model.config, compileable=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for padding in ("left", "none", "both"):
            expected = generate(model, prompt(padding), past_key_values=SparseKGenerationCache(model.config))
            found = generate(model, prompt(padding), past_key_values=past, compile_config=compiled)
            check_equal(found, expected)
            # All passes but the first, of which each gives a token that is not fed back.
            assert past.get_seq_length() == 24 + GREEDY["max_new_tokens"] - 1
            past.reset()
            assert past.get_seq_length() == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.cuda
def test_compiled_as_a_cuda_graph():
    """What generate does by itself on a GPU, with nothing in the way of a graph."""
    model = sparsify(build("llama").cuda(), num_keys=4, window=3)
    past = SparseKGenerationCache(model.config, compileable=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for padding in ("left", "none"):
        inputs = {name: x.cuda() for name, x in prompt(padding).items()}
        expected = generate(model, inputs, past_key_values=SparseKGenerationCache(model.config))
        check_equal(generate(model, inputs, past_key_values=past), expected)
        past.reset()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_compileable_without_compiling(options):
    model = sparsify(build("llama"), num_keys=4, window=3)
    results = []
    for compileable in (False, True):
        torch.manual_seed(5)
        past = SparseKGenerationCache(model.config, compileable=compileable)
        results.append(generate(model, prompt("left"), past_key_values=past, **options).sequences)
    assert torch.equal(*results)


def test_prompt_lookup_crops_the_cache():
    """Assisted generation takes back the keys, and their scores, of tokens that turn out wrong."""
    model = sparsify(build("llama"), num_keys=4, window=3)
    inputs = {"input_ids": tokens(1, 8).repeat(1, 3)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    past = DynamicCache(config=model.config)
    cropped = []
    crop = past.crop
    past.crop = lambda count: (cropped.append(count), crop(count))
    found = generate(model, inputs, past_key_values=past, prompt_lookup_num_tokens=3).sequences
    assert any(cropped)
    assert torch.equal(found, generate(model, inputs, use_cache=False).sequences)
    for layer in past.layers:
        assert layer.scores.shape == (1, layer.get_seq_length(), 2)
    with pytest.raises(NotImplementedError, match="use DynamicCache for assisted generation"):
        past = SparseKGenerationCache(model.config)
        generate(model, inputs, past_key_values=past, prompt_lookup_num_tokens=3)


def test_rows_of_a_cache():
    """Repeated and selected rows go on as before."""
    model = sparsify(build("llama"), num_keys=4, window=3)
    inputs = tokens(2, 20)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits[:, 15:]
        model(inputs[:, :15], past_key_values=past)
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([3, 0]))
        actual = model(inputs.flip(0)[:, 15:], past_key_values=past).logits
    torch.testing.assert_close(actual.flip(0), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_autocast():
    model = sparsify(build("llama"), num_keys=4, window=3)
    with torch.autocast("cpu", torch.bfloat16):
        caches = [make(model.config) for make in CACHES.values()]
        first, other = [generate(model, prompt("left"), past_key_values=past, max_new_tokens=4) for past in caches]
    assert caches[1].layers[0].dtype == torch.bfloat16
    assert (other.logits[0] - first.logits[0]).abs().max() < 0.1 * first.logits[0].abs().max()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_caches_that_cannot_be_compiled():
    model = sparsify(build("llama"), num_keys=4, layers=[1])
    with pytest.raises(ValueError, match=r"layers \[0, 2\] are dense"):
        SparseKGenerationCache(model.config, compileable=True)
    with pytest.raises(ValueError, match="compileable must be True or False, got 1"):
        SparseKGenerationCache(model.config, compileable=1)


def test_caches_that_have_no_place_for_scores():
    model = sparsify(build("llama"), num_keys=4)
    static = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match=r"StaticLayer at 0(.|\n)*its keys have no scores"):
        generate(model, prompt("none"), past_key_values=static)
    dense, past = build("llama"), DynamicCache()
    dense(tokens(), past_key_values=past)
    with pytest.raises(ValueError, match=r"DynamicLayer at 0(.|\n)*its keys have no scores"):
        model(tokens(), past_key_values=past)


@EVERY_CACHE
def test_caches_of_another_implementation(cache):
    """A cache goes on only where its scores do."""
    model = sparsify(build("llama"), num_keys=4)
    past = CACHES[cache](model.config)
    with torch.no_grad():
        model(tokens(), past_key_values=past)
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="got keys without scores"):
            model(tokens(), past_key_values=past)


def test_generation_cache_refuses():
    with pytest.raises(ValueError, match="call sparsify first"):
        SparseKGenerationCache(build("llama").config)
    model = sparsify(build("llama"), num_keys=4)
    with pytest.raises(ValueError, match="SparseKGenerationCache has no gradients"):
        model(tokens(), past_key_values=SparseKGenerationCache(model.config))
    with pytest.raises(ValueError, match="capacity must be at least num_keys = 4, got 3"):
        generate(model, prompt("left"), past_key_values=SparseKGenerationCache(model.config, capacity=3))
