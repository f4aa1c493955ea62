"""How many examples and directions travel together."""

from __future__ import annotations

import torch

from .free_memory import free_memory

# Elements of the largest tensor times the directions that travel through it together. On a CPU more falls out of the
# cache, and less makes matrices small and Python's share large.
CPU_ELEMENTS = 4_000_000
GPU_SHARE = 0.05
# That many directions travel together at least; what room is left goes to examples first.
DIRECTIONS = 8
# Each example of a chunk is told apart by a power of two.
MOST_EXAMPLES = 60
# More examples on a CPU cost memory and gain no speed.
CPU_EXAMPLES = 8
# Products keep a graph for two backward passes, many times the activations.
PRODUCT_ELEMENTS = 800_000


def sweep_chunk(
    batch: int,
    width: int,
    directions: int,
    device: torch.device,
    examples_at_once: int | None = None,
    directions_at_once: int | None = None,
) -> tuple[int, int]:
    """Examples and directions of a sweep that travel together.

    Args:
        batch: examples to divide, into chunks as equal as can be.
        width: elements of the largest activation of one example.
        directions: along which they are swept.
        device: on a GPU, its free memory counts.
        examples_at_once, directions_at_once: None fits them to the cache or the GPU.
    """
    budget = _budget(device, CPU_ELEMENTS)
    most = CPU_EXAMPLES if device.type == "cpu" else MOST_EXAMPLES
    room = max(1, min(most, budget // (width * min(directions, DIRECTIONS))))
    size = _even(batch, examples_at_once or room)
    return size, directions_at_once or max(DIRECTIONS, budget // (width * size))


def product_chunk(batch: int, width: int, device: torch.device, examples_at_once: int | None = None) -> int:
    """Examples whose products are taken together; arguments as for :func:`sweep_chunk`."""
    room = max(1, min(CPU_EXAMPLES, _budget(device, PRODUCT_ELEMENTS) // width))
    return _even(batch, examples_at_once or room)


def _even(examples: int, at_most: int) -> int:
    """The size of chunks that are as equal as can be."""
    return -(-examples // -(-examples // at_most))


def _budget(device: torch.device, on_cpu: int) -> int:
    """Elements of a tensor that travel together."""
    if device.type == "cuda":
        return int(free_memory(device) * GPU_SHARE / 4)
    return on_cpu
