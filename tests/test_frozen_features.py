"""Pooled hidden states of a backbone without its head."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from torch import nn

from hf_robust_ft import frozen_features


def test_text_is_pooled_over_what_the_mask_keeps() -> None:
    model = tiny.bert().train()
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    found = frozen_features(model, [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}])
    assert model.training
    model.eval()
    with torch.no_grad():
        short = model.base_model(input_ids=ids[:1, :3]).last_hidden_state[0]
        whole = model.base_model(input_ids=ids[1:]).last_hidden_state[0]
    for row, hidden in zip(found, (short, whole), strict=True):
        torch.testing.assert_close(row, torch.cat([hidden[0], hidden.mean(0)]), rtol=0, atol=1e-5)


def test_padding_on_the_left_counts_as_little() -> None:
    model = tiny.bert().eval()
    # Absolute positions would move with the padding: a model that has none tells the pooling alone.
    model.base_model.embeddings.position_embeddings.weight.data.zero_()
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    left = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    torch.testing.assert_close(frozen_features(model, [right]), frozen_features(model, [left]), rtol=0, atol=1e-5)


def test_batches_make_no_difference() -> None:
    model = tiny.bert()
    ids = torch.randint(1, 50, (6, 4), generator=torch.Generator().manual_seed(0))
    whole = frozen_features(model, [{"input_ids": ids}])
    parts = frozen_features(model, ({"input_ids": part} for part in ids.split(4)))
    assert whole.shape == (6, 2 * model.config.hidden_size)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


def test_feature_maps_are_averaged_over_places() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_channels=3, layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.base_model(pixel_values=pixels).last_hidden_state.mean((2, 3))
    torch.testing.assert_close(frozen_features(model, [{"pixel_values": pixels}]), expected)


def test_what_has_no_backbone_is_named() -> None:
    with pytest.raises(ValueError, match=r"Linear has no backbone.*estimate_transition\(features, labels\)"):
        frozen_features(nn.Linear(2, 2), [{"input": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="no batch"):
        frozen_features(tiny.bert(), [])
