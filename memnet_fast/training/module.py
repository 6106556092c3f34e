"""One stage of a training as a LightningModule. Lightning brings devices, processes, precision, accumulation and the bar."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, IterableDataset

from memnet_fast.errors import CheckpointMismatch, NumericError
from memnet_fast.reference import MemNet
from memnet_fast.training import lean
from memnet_fast.training.losses import multi_supervised
from memnet_fast.training.recipe import Recipe, Stage
from memnet_fast.training.samples import ImageSet, sample_batch


class _Ticks(IterableDataset):
    """What Lightning is given to iterate over: batches are made on the device, from seed and step."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class StageModule(lightning.LightningModule):
    """Trains `net` for one stage. `step` counts the optimiser's steps since the stage began, over all interruptions.

    images: [H, W] uint8 each. after_step(module): called after each step of the optimiser, on every process.
    """

    def __init__(
        self, net: MemNet, recipe: Recipe, stage: int, images: list[Tensor], after_step: Callable[[StageModule], None]
    ) -> None:
        super().__init__()
        self.recipe, self.stage = recipe, recipe.stages[stage]
        # Stages of one training see different batches.
        self.sample_seed = recipe.seed + 1_000_003 * stage
        layout = torch.channels_last if self.stage.channels_last else torch.contiguous_format
        self.net = net.to(memory_format=layout)  # type: ignore[call-overload]
        self.average = _averaged(net, self.stage) if self.stage.ema else None
        self.step = 0
        self.seconds = 0.0
        self.last_loss = math.nan
        self._clock = time.monotonic()
        self._optimizer_state: dict[str, Any] | None = None
        self._source, self._after_step = images, after_step
        self._images: ImageSet | None = None
        self._micro = 0
        self._losses: list[Tensor] = []
        heads = lean.heads if self.stage.memory == "lean" else _plain_heads
        self._heads = torch.compile(heads) if self.stage.compile else heads

    def state(self) -> dict[str, Any]:
        """All that decides what comes next; with `restore`, an interrupted stage goes on to the same bits."""
        return {
            "net": self.net.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizers().optimizer.state_dict(),  # type: ignore[union-attr]
            "step": self.step,
            "seconds": self.elapsed(),
        }

    def elapsed(self) -> float:
        """Seconds of training since the stage began, without interruptions."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        return self.seconds

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._optimizer_state = state["optimizer"]
        self.step, self.seconds = state["step"], state["seconds"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        biases = [m.bias for m in self.net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        slow = {id(p) for p in biases}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.net.parameters():
            # SGD as in the paper decays everything; AdamW, as is usual, only matrices.
            decay = self.stage.weight_decay if self.stage.optimizer == "sgd" or p.ndim > 1 else 0.0
            groups.setdefault((decay, self.stage.bias_rate if id(p) in slow else 1.0), []).append(p)
        parameters = [{"params": ps, "weight_decay": decay, "factor": factor} for (decay, factor), ps in groups.items()]
        if self.stage.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.stage.lr, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=self.stage.lr, betas=(0.9, 0.99))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Ticks(), batch_size=None)

    def on_fit_start(self) -> None:
        self._images = ImageSet(self._source, self.recipe.levels, self.stage.patch, self.device)
        self._clock = time.monotonic()

    def on_train_start(self) -> None:
        if self._optimizer_state is not None:
            try:
                self.optimizers().optimizer.load_state_dict(self._optimizer_state)  # type: ignore[union-attr]
            except (ValueError, KeyError) as error:
                raise CheckpointMismatch(f"the checkpoint holds the state of another optimiser: {error}") from error
            self._optimizer_state = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        rate = self.stage.rate(self.step)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * group["factor"]

    def checked_state(self) -> dict[str, Any]:
        """`state`. Raises NumericError where a weight is not finite: the next loss would show it, but saving comes first."""
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            raise NumericError(f"a weight is not finite after step {self.step}; the last good state is kept")
        return self.state()

    def samples(self, number: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(degraded, clean) of a batch, by its number since the stage began."""
        assert self._images is not None
        degraded, clean = sample_batch(self._images, self.stage.batch, self.sample_seed, number, share)
        return degraded.contiguous(memory_format=torch.channels_last) if self.stage.channels_last else degraded, clean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        degraded, clean = self.samples(self.step * self.stage.accumulate + self._micro, share)
        heads = self._heads(self.net, degraded)
        loss = multi_supervised(heads, self.net.head_weights, clean, self.stage.loss)
        self._losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.stage.clip:
            limit = self.stage.clip / self.stage.rate(self.step) if self.stage.clip_by_lr else self.stage.clip
            nn.utils.clip_grad_norm_(self.net.parameters(), limit)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Only with a finite loss: a weight that has been NaN once stays NaN."""

        def closure() -> Any:
            result = optimizer_closure()
            self.last_loss = float(torch.stack(self._losses).mean())
            if not math.isfinite(self.last_loss):
                raise NumericError(f"the loss is {self.last_loss} at step {self.step}; the last good state is kept")
            return result

        optimizer.step(closure=closure)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._micro += 1
        if self._micro < self.stage.accumulate:
            return
        self._micro, self._losses = 0, []
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.net)
        logged = {"loss": self.last_loss, "lr": self.stage.rate(self.step - 1)}
        self.log_dict(logged, prog_bar=True)
        self.log("step", float(self.step))  # Lightning's own count begins anew after an interruption
        self._after_step(self)

    @torch.no_grad()
    def result(self) -> MemNet:
        """A copy of the trained network (averaged, with settled statistics, where the stage asks for them), in eval mode."""
        trained = self.net if self.average is None else self.average.module
        net = MemNet(dataclasses.replace(self.recipe.network, num_recursions=self.stage.recursions)).to(self.device)
        net.load_state_dict(trained.state_dict())
        if self.stage.settle:
            # Batches that training does not see. In float32: statistics of rounded activations are not wanted.
            first = self.stage.steps * self.stage.accumulate
            with torch.autocast(self.device.type, enabled=False):
                update_bn((self.samples(first + i)[0] for i in range(self.stage.settle)), net.train())
        return net.eval()


def _plain_heads(net: MemNet, x: Tensor) -> list[Tensor]:
    return net.heads(x)


def _averaged(net: MemNet, stage: Stage) -> AveragedModel:
    """The first steps count little: for them the average is over fewer steps than `ema` stands for."""

    def average(averaged: Any, current: Any, count: Tensor | int) -> None:
        decay = min(stage.ema, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    return AveragedModel(net, multi_avg_fn=average).requires_grad_(False)
