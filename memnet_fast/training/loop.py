"""A small training loop for blind restoration: everything in memory, one process, any device.

A stage trains a MemNet for a number of steps under a cosine schedule. A stage may start from the result of one with fewer
recursions: `grow` adds recursions without changing the function, so that most steps run on the cheap, shallow network.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError, NumericError
from memnet_fast.metrics import psnr
from memnet_fast.reference import MemNet
from memnet_fast.tasks import Task
from memnet_fast.training.samples import ImageSet, Levels, sample_batch


@dataclass(frozen=True)
class Stage:
    """One stage of training: sizes in pixels; task, low, high and only as in `Levels`."""

    recursions: int = 6
    steps: int = 1000
    batch: int = 8
    patch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.998
    task: str = "denoise"
    low: float = 5.0
    high: float = 70.0
    only: tuple[float, ...] = ()
    seed: int = 0

    @property
    def levels(self) -> Levels:
        return Levels(self.task, self.low, self.high, self.only)


def load_gray_images(folder: Path) -> list[Tensor]:
    """Every PNG of a folder in order of name, each [H, W] uint8. Raises InputError where there is none."""
    images = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path, formats=["PNG"]) as image:
            images.append(torch.from_numpy(np.array(image.convert("L"))))
    if not images:
        raise InputError(f"no PNG file in {folder}")
    return images


def loss_function(net: MemNet, degraded: Tensor, clean: Tensor) -> Tensor:
    """Multi-supervised loss (equation 10 of the paper) with Charbonnier's distance in place of the square, which keeps high
    noise levels from drowning the low ones."""

    def distance(y: Tensor) -> Tensor:
        return torch.sqrt((y.float() - clean) ** 2 + 1e-6).mean()

    heads = net.heads(degraded)
    if net.head_weights is None:
        return distance(heads[0])
    alpha = 1 / (len(heads) + 1)
    ensemble = torch.stack([w * h.float() for w, h in zip(net.head_weights, heads, strict=True)]).sum(0)
    return alpha * distance(ensemble) + (1 - alpha) / len(heads) * torch.stack([distance(h) for h in heads]).sum()


@torch.no_grad()
def grow(net: MemNet, recursions: int) -> MemNet:
    """A MemNet with more recursions that computes, until it is trained, what `net` computes.

    The convolutions are shared over the recursions; the new batch normalisations start as copies of the last, and the gates
    read the new short-term memories with zero weights.
    """
    old = net.config
    if old.sharing != "conv" or recursions < old.num_recursions:
        raise InputError("only a network with shared convolutions grows, and only to more recursions")
    new = MemNet(dataclasses.replace(old, num_recursions=recursions))
    source, target = net.state_dict(), new.state_dict()
    short, more, c = old.num_recursions * old.channels, recursions * old.channels, old.channels
    for name, value in target.items():
        parts = name.split(".")
        if ".gate." in name and value.ndim > 0 and name != f"blocks.{parts[1]}.gate.conv.bias":
            # The gate of block m reads m + 1 long-term and R short-term memories, in the configured order.
            long = (int(parts[1]) + 1) * c
            if old.gate_order == "long_short":
                kept = torch.arange(long + short)
            else:
                kept = torch.cat([torch.arange(short), more + torch.arange(long)])
            if name.endswith("conv.weight"):
                value.zero_()
                value[:, kept] = source[name]
            else:
                value[kept] = source[name]
        elif ".bn_" in name:
            parts[3] = str(min(int(parts[3]), old.num_recursions - 1))
            value.copy_(source[".".join(parts)])
        else:
            value.copy_(source[name])
    return new


@torch.no_grad()
def settle_batch_norm(net: MemNet, images: ImageSet, stage: Stage, batches: int = 32) -> None:
    """Running statistics anew, as plain averages over batches, in float32: those of training lag behind the weights."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    net.train()
    for step in range(batches):
        net(sample_batch(images, stage.batch, stage.seed, stage.steps + step)[0])
    net.eval()
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


@torch.no_grad()
def validate(
    net: nn.Module, images: list[Tensor], task: Task, levels: tuple[float, ...] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean PSNR in dB over the images for each level, by the paper's protocol: (restored, degraded). Noise has a fixed seed."""
    net.eval()
    device = next(net.parameters()).device
    restored, degraded = {}, {}
    for level in levels or task.levels:
        generator = torch.Generator().manual_seed(0)
        after, before = [], []
        for image in images:
            clean = task.clean(image[None, None].float() / 255, level)
            given = task.degrade(clean, level, generator)
            after.append(psnr(net(given.to(device)).cpu(), clean, task.protocol(level)))
            before.append(psnr(given, clean, task.protocol(level)))
        restored[task.label(level)], degraded[task.label(level)] = (sum(v) / len(v) for v in (after, before))
    return restored, degraded


def train_stage(
    net: MemNet,
    images: ImageSet,
    stage: Stage,
    *,
    checkpoint: Path,
    log: Path | None = None,
    device: str = "cpu",
    bf16: bool = True,
    save_every: float = 300.0,
) -> MemNet:
    """Trains `net` for one stage and returns the averaged weights with settled statistics, in eval mode.

    checkpoint: resumed from when it exists and belongs to this stage; written every `save_every` seconds, whole or not at all.
    log: one JSON line for every 50 steps. Raises NumericError when the loss is not finite; the checkpoint stays.
    """
    torch.manual_seed(stage.seed)
    net = net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = MemNet(net.config).to(device)
    average.load_state_dict(net.state_dict())
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.99))
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["stage"] != dataclasses.asdict(stage):
            raise InputError(f"{checkpoint} belongs to another stage; remove it to start this one afresh")
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    saved = time.monotonic()
    window: list[float] = []
    while step < stage.steps:
        rate = stage.lr * (
            (step + 1) / stage.warmup
            if step < stage.warmup
            else 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (step - stage.warmup) / max(1, stage.steps - stage.warmup)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        degraded, clean = sample_batch(images, stage.batch, stage.seed, step)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_function(net, degraded.contiguous(memory_format=torch.channels_last), clean)
        value = loss.item()
        if not math.isfinite(value):
            raise NumericError(f"the loss is {value} at step {step}; the last good state is in {checkpoint}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), stage.clip)
        optimizer.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(stage.ema, (1 + step) / (10 + step))
            for target, source in zip(average.parameters(), net.parameters(), strict=True):
                target.lerp_(source, weight)
        window.append(value)
        if step % 50 == 0 or step == stage.steps:
            _log_line(log, {"step": step, "loss": sum(window) / len(window), "lr": rate, "time": time.time()})
            window = []
        if time.monotonic() - saved > save_every or step == stage.steps:
            _save(
                checkpoint,
                {
                    "stage": dataclasses.asdict(stage),
                    "config": net.config.to_dict(),
                    "net": net.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                },
            )
            saved = time.monotonic()
    settle_batch_norm(average, images, stage)
    return average


def load_result(path: Path) -> MemNet:
    """The network that a finished stage saved with `save_result`."""
    state = torch.load(path, weights_only=True)
    net = MemNet(MemNetConfig.from_dict(state["config"]))
    net.load_state_dict(state["net"])
    return net.eval()


def save_result(net: MemNet, history: list[dict[str, Any]], path: Path) -> None:
    _save(path, {"config": net.config.to_dict(), "net": net.state_dict(), "history": json.dumps(history)})


def load_history(path: Path) -> list[dict[str, Any]]:
    """The stages behind a result, oldest first."""
    return json.loads(torch.load(path, weights_only=True)["history"])


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    temporary.replace(path)


def _log_line(log: Path | None, record: dict[str, Any]) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
