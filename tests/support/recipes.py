"""Small data and small recipes for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from memnet_fast.config import MemNetConfig
from memnet_fast.files import write_whole
from memnet_fast.reference import MemNet
from memnet_fast.training.recipe import Recipe, load_recipe

TINY = """
task = "denoise"
log_every = 1
[levels]
low = 20
high = 50
[network]
channels = 4
num_memory_blocks = 2
[training]
batch = 2
patch = 16
warmup = 2
settle = 2
lr = 2e-3
precision = "fp32"
[[stages]]
recursions = 1
steps = 3
[[stages]]
recursions = 2
steps = 3
accumulate = 2
"""


def images() -> list[torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(40), torch.arange(48), indexing="ij")
    return [(128 + 100 * torch.sin(x / (3 + k)) * torch.cos(y / 7)).to(torch.uint8) for k in (2, 3)]


def image_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images()):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return folder


def recipe_file(folder: Path) -> Path:
    """TINY with data beside it; the output folder is `run`."""
    if not (folder / "data").exists():
        image_folder(folder / "data")
    path = folder / "tiny.toml"
    # Whole at every moment: processes of a test write it while others read it.
    write_whole(path, f'data = "{folder / "data"}"\noutput = "{folder / "run"}"\n{TINY}'.encode())
    return path


def recipe(folder: Path, **overrides: Any) -> Recipe:
    """overrides: keys with __ for dots."""
    texts = tuple(f"{k.replace('__', '.')}={str(v).lower() if isinstance(v, bool) else v}" for k, v in overrides.items())
    return load_recipe(recipe_file(folder), texts)


def network(config: MemNetConfig, seed: int = 1) -> MemNet:
    """Batch normalisations as different from 1 and 0 as after training."""
    torch.manual_seed(seed)
    net = MemNet(config)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
    return net
