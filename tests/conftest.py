"""Settings of every test."""

from __future__ import annotations

import os

# Nothing here may ask the Hub; set before any test imports a library that reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Tiny models lose more to threads waiting for each other than they gain.
torch.set_num_threads(1)
