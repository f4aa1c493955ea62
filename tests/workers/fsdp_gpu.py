"""A run in bf16 under Accelerate's FSDP2, and the run resumed in the middle; tests/test_gpu.py starts it.

torchrun --nproc_per_node N fsdp_gpu.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments
from hf_robust_ft.sharding import reshard, whole

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def examples(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def trained(out: Path, checkpoint: str | None) -> HessianRegularizedTrainer:
    arguments = RobustTrainingArguments(
        str(out), bf16=True, max_steps=4, save_steps=2, learning_rate=0.01, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=4, train_sampling_strategy="sequential", noise_transition=0.2,
        loss_correction="posterior", layer_radius={"*encoder*": 0.05}, l2sp_penalty=0.1, hessian_penalty=0.01,
        hessian_examples=6, hessian_time_budget=2, fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **SIZES, **STILL))
    trainer = HessianRegularizedTrainer(model, arguments, train_dataset=examples(64), eval_dataset=examples(8))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


if __name__ == "__main__":
    out = Path(sys.argv[1])
    straight = trained(out, None)
    assert straight.is_fsdp_enabled
    assert all(isinstance(weight, DTensor) and weight.is_cuda for weight in straight.model.parameters())
    rows = [row for row in straight.constraint_table() if row.radius is not None]
    assert len(rows) == 12
    assert all(row.distance <= row.radius for row in rows)
    assert any(row.active for row in rows)
    assert straight.hessian_report is not None
    assert straight.evaluate()["eval_loss"] > 0
    reshard(straight.model)
    resumed = trained(out, str(out / "checkpoint-2"))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(whole(one), whole(other), rtol=1e-3, atol=1e-3)
    dist.barrier()
    dist.destroy_process_group()
