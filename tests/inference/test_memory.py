"""Memory beside the slide: one float plane and one batch of windows, measured as the process's own growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The first slide loads what is loaded once. The largest resident set since is the kernel's own count, reset before each
# slide.
SCRIPT = """
import ctypes, json, sys
import numpy as np, torch
from hubmap_kit.config import Experiment, InferenceConfig
from hubmap_kit.inference.ensemble import Ensemble
torch.set_num_threads(1)

class Copy(torch.nn.Module):
    def forward(self, inputs):
        return inputs[:, :1].clone()

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

grown = []
for reduce, views, side in json.loads(sys.argv[1]):
    settings = Experiment(scale={"reduce": reduce}, inference=InferenceConfig(window=512, overlap=0.25, views=views))
    ensemble = Ensemble(settings, [Copy()], {}, torch.device("cpu"))
    slide = np.full((side, side, 3), 120, np.uint8)
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps from the last slide would hide what this one takes
    before = field("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    plane = ensemble.probability(slide, 0.4)
    grown.append((field("VmHWM") - before) / 2**20)
    assert plane.shape == (side, side)
    del slide, plane
print(json.dumps(grown))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the largest resident set since a moment"
)
def test_memory_of_large_slides() -> None:
    """In MiB beside the slide and the network: a plane of 3000 x 3000 is 34 of them, one of 4500 x 4500 is 77."""
    plan = [(1, "none", 600), (1, "flips", 3000), (2, "none", 3000), (2, "none", 4500)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(plan)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, full, half, largest = json.loads(done.stdout)
    assert first < 30 and 34 <= full <= 64 and 34 <= half <= 72 and 77 <= largest <= 200
