"""Measuring a model that does not fit into memory: how much it then holds, and how much longer it takes.

    OMP_NUM_THREADS=1 python recipes/bench_offload.py

A ViT-B with random weights (86M of them) is measured in two fresh processes, which must find the same: whole, and
offloaded to the disk by Accelerate in a process that is told that the machine has ``--free`` MB left. Half of that is
room for weights. What a process holds is its anonymous memory (Linux), looked at every 3 ms, less what it holds with
torch loaded and no model; the reference is a mapped file, and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_robust_ft import layer_quadratic_forms

EXAMPLES, PIXELS = 4, 64
KINDS = ("hessian", "hessian_upper")
HOW = ("whole", "offloaded")


def main() -> None:
    options = parse()
    if options.one:
        measure(options.one, options.kind, options.free, options.blocks)
        return
    rows = []
    print(f"{'':28} {'MB whole':>9} {'offloaded':>10} {'s whole':>8} {'offloaded':>10} {'ratio':>6}")
    for kind in KINDS:
        pair = {how: child(how, kind, options) for how in HOW}
        whole, offloaded = (pair[how] for how in HOW)
        torch.testing.assert_close(
            torch.tensor(offloaded.pop("values")), torch.tensor(whole.pop("values")), rtol=1e-3, atol=1e-6
        )
        longer = offloaded["seconds"] / whole["seconds"]
        print(
            f"{kind:28} {whole['MB']:9.0f} {offloaded['MB']:10.0f} {whole['seconds']:8.1f} "
            f"{offloaded['seconds']:10.1f} {longer:6.2f}",
            flush=True,
        )
        rows.append({"kind": kind, "free MB": options.free, "ratio": longer, **pair})
    about = {name: version(name) for name in ("torch", "transformers", "accelerate")} | {"machine": platform.machine()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--free", type=int, default=120, help="MB that the offloaded model's process thinks are left")
    parser.add_argument("--blocks", type=int, default=12, help="of the model")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_offload.json"))
    parser.add_argument("--one", choices=HOW, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(how: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--free", str(options.free), "--blocks", str(options.blocks)]
    command = [sys.executable, __file__, "--one", how, "--kind", kind, *sizes]
    # From the start on: what glibc keeps of making the model is used again, and counts or not as chance will have it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(how: str, kind: Any, free: int, blocks: int) -> None:
    """Prints a line of JSON."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bare = own_memory()
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=blocks, image_size=PIXELS, num_labels=10)).eval()
        moved = {name: w + 0.01 * torch.randn_like(w) for name, w in model.state_dict().items()}
        save_file(moved, Path(folder) / "reference.safetensors")
        del moved
        if how == "offloaded":
            disk_offload(model, folder, torch.device("cpu"))
            available = SimpleNamespace(available=free * 10**6)
            psutil.virtual_memory = lambda: available
        reference = load_file(Path(folder) / "reference.safetensors")
        batch = {"pixel_values": torch.randn(EXAMPLES, 3, PIXELS, PIXELS), "labels": torch.arange(EXAMPLES)}
        with Watch() as watch:
            forms = layer_quadratic_forms(model, batch, reference, kind=kind, examples_at_once=EXAMPLES)
    row = {"MB": (watch.most - bare) / 1e6, "seconds": watch.seconds, "values": forms.values.tolist()}
    print(json.dumps(row))


class Watch:
    """The most memory of this process, and its seconds of computing (other programs may run)."""

    def __enter__(self) -> Watch:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._start = time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.process_time() - self._start
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.003):
            self.most = max(self.most, own_memory())


def own_memory() -> int:
    """Bytes that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


if __name__ == "__main__":
    main()
