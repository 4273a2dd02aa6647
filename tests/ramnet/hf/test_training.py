"""Training with transformers: activation checkpointing, Trainer, LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import ramnet
from ramnet.hf import HFRamNetForCausalLM
from ramnet.ops import reference
from tests.ramnet.hf.models import both
from tests.ramnet.test_model import tokens

IDS = tokens(2, 9)


def gradients(hf: nn.Module) -> dict[str, torch.Tensor]:
    hf.zero_grad()
    hf(IDS, labels=IDS).loss.backward()
    return {name: x.grad for name, x in hf.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_blocks_and_gives_the_same_gradients(reentrant: bool) -> None:
    _, hf = both()
    calls: list[nn.Module] = []
    for block in hf.ramnet.blocks:
        block.register_forward_pre_hook(lambda block, *_: calls.append(block))
    expected = gradients(hf.train())
    assert len(calls) == 3
    hf.activation_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(hf)
    assert len(calls) == 3 + 2 * 3
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())
    hf.activation_checkpointing_disable()
    gradients(hf)
    gradients(hf.eval())
    assert len(calls) == 3 + 2 * 3 + 2 * 3


def trainer(hf: nn.Module, folder: Path, **options: object) -> Trainer:
    rows = tokens(16, 12, seed=5)
    rows[:, 1::2] = rows[:, ::2]  # each token twice, which can be learnt
    # Rows of unequal numbers of labels: a mean over batches is not the mean over labels.
    ignored = torch.arange(12) < torch.arange(16).unsqueeze(1) // 2
    data = [{"input_ids": x, "labels": y} for x, y in zip(rows, rows.masked_fill(ignored, -100), strict=True)]
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, seed=0, learning_rate=3e-2,
        logging_steps=100, save_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model=hf, args=arguments, train_dataset=data, eval_dataset=data)


def test_trainer_lowers_the_loss_evaluates_and_saves(tmp_path: Path) -> None:
    _, hf = both()
    run = trainer(hf, tmp_path, max_steps=10, per_device_train_batch_size=8, per_device_eval_batch_size=16)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < before - 0.5
    assert run.predict(run.eval_dataset).predictions.shape == (16, 12, 11)
    run.save_model()
    again = HFRamNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, hf.eval()(IDS).logits)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for parts in (1, 4):
        _, hf = both()
        run = trainer(
            hf, tmp_path, max_steps=1, per_device_train_batch_size=16 // parts, gradient_accumulation_steps=parts
        )
        run.train()
        weights.append(torch.cat([x.flatten() for x in hf.parameters()]).detach())
    assert (weights[0] - weights[1]).abs().max().item() < 1e-4


def test_lora_trains_its_own_weights_only_and_is_merged(tmp_path: Path) -> None:
    _, hf = both()
    untouched = {name: x.clone() for name, x in hf.state_dict().items()}
    adapted = get_peft_model(hf, LoraConfig(r=2, target_modules=["query_key_value", "gate_up"], task_type="CAUSAL_LM"))
    adapted.enable_input_require_grads()
    adapted.activation_checkpointing_enable()
    assert all("lora_" in name for name in gradients(adapted.train()))
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    expected = adapted(IDS).logits
    _, base = both()
    assert (expected - base(IDS).logits).abs().max().item() > 1e-3
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    assert torch.equal(
        again.generate(input_ids=IDS, max_new_tokens=3), adapted.generate(input_ids=IDS, max_new_tokens=3)
    )
    merged = again.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-5)
    kept = adapted.unload().state_dict()
    assert all(torch.equal(kept[name], x) for name, x in untouched.items())


def test_tokens_trained_in_a_tied_embedding_are_merged() -> None:
    _, hf = both(tie_embeddings=True)
    settings = LoraConfig(
        r=2, target_modules=["query_key_value"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(hf, settings)
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=1.0)
    adapted(IDS, labels=IDS).loss.backward()
    optimizer.step()
    adapted.eval()
    expected = adapted(IDS).logits
    assert (expected - both(tie_embeddings=True)[1](IDS).logits).abs().max().item() > 1e-3
    assert torch.allclose(adapted.merge_and_unload()(IDS).logits, expected, atol=1e-5)


def test_label_smoothing_of_trainer_predicts_the_next_token(tmp_path: Path) -> None:
    _, hf = both()
    losses = [trainer(hf, tmp_path, label_smoothing_factor=x).evaluate()["eval_loss"] for x in (0.0, 1e-6)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_blocks_are_recomputed_on_the_kernels_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm", reason="the kernels need tvm: pip install 'ramnet[tvm]'")
    _, hf = both()
    hf.train().activation_checkpointing_enable()
    with ramnet.use("cpu"):
        loss = hf(IDS, labels=IDS).loss
    monkeypatch.setattr(reference, "memory_scan", lambda *_, **__: pytest.fail("the reference runs"))
    loss.backward()


def test_a_compiled_model_recomputes_its_blocks() -> None:
    pytest.importorskip("tvm", reason="the kernels need tvm: pip install 'ramnet[tvm]'")
    _, hf = both()
    hf.train().activation_checkpointing_enable()
    expected = gradients(hf)
    fast = ramnet.compile(hf.ramnet, backend="eager")
    recompute, calls = fast._gradient_checkpointing_func, []
    fast._gradient_checkpointing_func = lambda *of: calls.append(of) or recompute(*of)
    hf.zero_grad()
    fast(IDS, labels=IDS).loss.backward()
    assert len(calls) == 3
    for name, x in hf.named_parameters():
        torch.testing.assert_close(x.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_fsdp_shards_blocks(alone: None) -> None:
    _, hf = both()
    expected = gradients(hf.train())
    mesh = init_device_mesh("cpu", (1,))
    for block in hf.ramnet.blocks:
        fully_shard(block, mesh=mesh)
    found = gradients(fully_shard(hf, mesh=mesh))
    assert all(torch.equal(found[name].full_tensor(), x) for name, x in expected.items())
    _, hf = both()
    fully_shard(hf.ramnet, mesh=mesh)  # what accelerate does by default
    with pytest.raises(ValueError, match=r"give TrainingArguments fsdp_config=\{'transformer_layer_cls_to_wrap'"):
        hf(IDS)


def test_prompt_tuning_inserts_its_tokens_once() -> None:
    _, hf = both()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=12, num_layers=1, num_attention_heads=1
    )
    adapted, ids = get_peft_model(hf, config).eval(), IDS
    for _ in range(5):
        ids = torch.cat([ids, adapted(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), ids)
