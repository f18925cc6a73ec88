"""Fine-tuning of transformers models with SparseK attention: gradients, gradient checkpointing, Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers_case import FAMILIES, VOCABULARY, batch_of, build, tokens

from xformers_sparsek.integrations.transformers import (
    from_pretrained,
    parameter_groups,
    sparsify,
    train_scorers_only,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def is_scorer(name: str) -> bool:
    return ".sparsek_scorer." in name


def gradients(model: PreTrainedModel, padding: str = "left") -> dict[str, Tensor]:
    """Gradients of the language-modelling loss, of every parameter that has one."""
    batch = batch_of(padding)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY_FAMILY
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gradients_equal_the_stock_model_where_every_key_is_kept(family, padding):
    model = build(family).train()
    expected = gradients(model, padding)
    actual = gradients(sparsify(model, num_keys=24, window=2), padding)
    assert {name for name in actual if not is_scorer(name)} == set(expected)
    for name, grad in actual.items():
        if is_scorer(name):
            assert (grad == 0).all()  # all gates are 1, whatever the scores
        else:
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-4 * expected[name].abs().max().item())


@EVERY_FAMILY
@pytest.mark.parametrize("hard", [False, True])
def test_scorers_get_gradients(family, hard):
    model = sparsify(build(family).train(), num_keys=4, window=2, hard=hard)
    found = gradients(model)
    assert len([name for name in found if is_scorer(name)]) == 9
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in found.values())


def test_gradient_of_a_scorer_is_the_slope_of_the_loss():
    """By finite differences, through padding, selection and all layers; of GPT-2, which stays in float64 throughout."""
    model = sparsify(build("gpt2").double(), num_keys=4, window=2)
    batch = batch_of("left")
    weights = torch.randn(3, 24, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights *= batch["attention_mask"].unsqueeze(-1)

    def loss() -> Tensor:
        return (model(**batch).logits * weights).sum()

    loss().backward()
    step = 1e-6
    scorers = [(name, parameter) for name, parameter in model.named_parameters() if is_scorer(name)]
    for name, parameter in scorers:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(step * direction)
            ahead = loss()
            parameter.sub_(2 * step * direction)
            behind = loss()
            parameter.add_(step * direction)
        slope = ((ahead - behind) / (2 * step)).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-5), name


@EVERY_FAMILY
@pytest.mark.parametrize("scorers_only", [False, True])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing(family, scorers_only, checkpointing):
    model = sparsify(build(family).train(), num_keys=4, window=2, layers=[0, 2])
    if scorers_only:
        assert train_scorers_only(model) is model
    expected = gradients(model)
    assert all(map(is_scorer, expected)) == scorers_only
    assert len([name for name in expected if is_scorer(name)]) == 6
    model.gradient_checkpointing_enable(checkpointing)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scorers_only", [False, True])
def test_rates_of_scorers_and_others(family, scorers_only, tmp_path):
    """Every parameter that learns is in one group, once, and Trainer's steps are as long as its group says."""
    model = sparsify(build(family), num_keys=4, window=2)
    if scorers_only:
        train_scorers_only(model)
    groups = parameter_groups(model, lr=1e-4, scorer_lr=1e-2, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.0), (1e-4, 0.1)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    expected = [[name for name in names.values() if is_scorer(name) == scorer] for scorer in (True, False)]
    assert list(map(sorted, found)) == [sorted(expected[0]), [] if scorers_only else sorted(expected[1])]

    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none")
    optimizer = torch.optim.AdamW(groups)
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    moved = {name: (x - before[name]).abs().max().item() for name, x in model.state_dict().items()}
    for name, distance in moved.items():  # AdamW's first step is as long as its rate; decay adds a little
        rate = 1e-2 if is_scorer(name) else 0.0 if scorers_only else 1e-4
        assert distance == pytest.approx(rate, rel=0.3), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scorers_only", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_trainer(family, scorers_only, options, tmp_path):
    """What is to be trained changes, nothing else does, and the checkpoint is loaded with its scorers."""
    model = sparsify(build(family), num_keys=4, window=2)
    if scorers_only:
        train_scorers_only(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 10 * VOCABULARY for loss in losses)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_scorer(name) or not scorers_only}

    loaded = from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(loaded.state_dict(), after, rtol=0, atol=0)
    other = sparsify(build(family, seed=1), num_keys=4, window=2)
    if scorers_only:
        train_scorers_only(other)
    resumed = Trainer(model=other, args=arguments, train_dataset=rows)
    resumed.args.max_steps = 5
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 5
    drift = max((x - after[name]).abs().max() for name, x in resumed.model.state_dict().items())
    assert 0 < drift < 0.1  # one step from where the other stopped, not from other random weights
