"""One stage of a training as a LightningModule. Lightning brings devices, processes, precision, accumulation and the bar."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset

from memnet_fast.errors import CheckpointMismatch, InputError, NumericError
from memnet_fast.reference import MemNet
from memnet_fast.training import lean, units
from memnet_fast.training.losses import multi_supervised
from memnet_fast.training.muon import Muon, is_matrix
from memnet_fast.training.recipe import Recipe, Stage
from memnet_fast.training.samples import ImageSet, sample_batch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def check_stage(stage: Stage, net: MemNet, device: torch.device, world: int) -> None:
    """Raises InputError where a stage cannot be trained on a device by so many processes. net: on the CPU still."""
    if stage.kernels == "native":
        missing = units.why_not(net) if device.type == "cpu" else f"the device is {device}"
        if missing:
            raise InputError(f"kernels = 'native' cannot train here: {missing}")
    if stage.sync_batchnorm and world > 1 and device.type != "cuda":
        raise InputError(f"sync_batchnorm over several processes needs CUDA, and the device is {device}")
    if stage.compile:
        lean.check_compiler(device)


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
        # Nothing but the statistics depends on the mode. A result comes in eval mode, and Lightning leaves modes as they are.
        self._batch_statistics = self.stage.statistics == "batch"
        self.net = net.train(self._batch_statistics).to(memory_format=layout)  # type: ignore[call-overload]
        # Only its parameters count: the statistics of batch normalisation are an average already.
        self.average = copy.deepcopy(self.net).requires_grad_(False) if self.stage.ema else None
        self.averaged = 0  # updates of the average
        self.step = 0
        self.seconds = 0.0
        self.rate = 0.0  # of the step at hand
        self._spent = 0.0  # seconds before the step at hand, the same on every process; only where the stage has `minutes`
        self.last_loss = math.nan
        self._clock = time.monotonic()
        self._optimizer_state: dict[str, Any] | None = None
        self._source, self._after_step = images, after_step
        self._images: ImageSet | None = None
        self._micro = 0
        self._losses: list[Tensor] = []
        self.kernels = ""  # "native" or "torch", once the device is known
        self._heads: Callable[[MemNet, Tensor], list[Tensor]] = _plain_heads

    @property
    def ended(self) -> bool:
        """Whether the stage has had its steps or its minutes."""
        return self.step >= self.stage.steps or self._late

    @property
    def _late(self) -> bool:
        return 0 < 60 * self.stage.minutes <= self._spent

    def state(self) -> dict[str, Any]:
        """All that decides what comes next; with `restore`, an interrupted stage goes on, on CPUs to the same bits."""
        average = None if self.average is None else {n: p.detach() for n, p in self.average.named_parameters()}
        return {
            "net": self.net.state_dict(),
            "average": average,
            "averaged": self.averaged,
            "optimizer": self.optimizers().optimizer.state_dict(),  # type: ignore[union-attr]
            "step": self.step,
            # Between `ended` now and after `restore` there must be no difference.
            "seconds": self._spent if self.stage.minutes else self.elapsed(),
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
            # Of a stage that went without until now, the average begins here.
            self.average.load_state_dict({**state["net"], **(state["average"] or {})})
            self.averaged = state["averaged"]
        self._optimizer_state = state["optimizer"]
        self._load_optimizer(self.configure_optimizers())  # what is another optimiser's is refused here
        self.step = state["step"]
        self.seconds = self._spent = state["seconds"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        biases = [m.bias for m in self.net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        slow = {id(p) for p in biases}
        # By kind, not by value: with other values of weight_decay and bias_rate a checkpoint's groups stay the same.
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for p in self.net.parameters():
            # SGD as in the paper decays everything; AdamW, as is usual, only matrices.
            decays = self.stage.optimizer == "sgd" or p.ndim > 1
            groups.setdefault((decays, id(p) in slow, self.stage.optimizer == "muon" and is_matrix(p)), []).append(p)
        parameters = [
            {
                "params": ps,
                "weight_decay": self.stage.weight_decay if decays else 0.0,
                "factor": self.stage.bias_rate if bias else 1.0,
                "matrices": matrices,
            }
            for (decays, bias, matrices), ps in groups.items()
        ]
        if self.stage.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.stage.lr, momentum=0.9)
        fused = True if self.device.type == "cuda" else None  # one kernel for each group
        adamw = Muon if self.stage.optimizer == "muon" else torch.optim.AdamW
        return adamw(parameters, lr=self.stage.lr, betas=(0.9, 0.99), fused=fused)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Ticks(), batch_size=None)

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            _keep_memory()
        self._choose_kernels()
        self._images = ImageSet(self._source, self.recipe.levels, self.stage.patch, self.device, self.stage.jpeg)
        self._clock = time.monotonic()

    def _choose_kernels(self) -> None:
        stage = self.stage
        auto = stage.kernels == "auto" and stage.memory == "lean" and not stage.compile and not units.why_not(self.net)
        self.kernels = "native" if auto or stage.kernels == "native" else "torch"
        if stage.memory == "lean":
            self._heads = functools.partial(lean.heads, compiled=stage.compile, native=self.kernels == "native")
        elif stage.compile:
            self._heads = torch.compile(_plain_heads)

    def on_train_start(self) -> None:
        if self._optimizer_state is not None:
            self._load_optimizer(self.optimizers().optimizer)  # type: ignore[union-attr]
            self._optimizer_state = None

    def _load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        saved = self._optimizer_state
        assert saved is not None
        try:
            # The hyper-parameters are those of the recipe, which may have changed, and of this device.
            groups = [
                {**own, "params": old["params"]} for own, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
            ]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise CheckpointMismatch(f"the checkpoint holds the state of another optimiser: {error}") from error

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.stage.minutes:  # one clock for all processes, or each would take another step
            self._spent = self.trainer.strategy.broadcast(self.elapsed())
        self.rate = self.stage.rate(self.step, self._spent)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.rate * group["factor"]

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
        loss = multi_supervised(heads, self.net.head_weights, clean, self.stage.loss, self.stage.alpha)
        self._losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.stage.clip:
            limit = self.stage.clip / self.rate if self.stage.clip_by_lr else self.stage.clip
            nn.utils.clip_grad_norm_(self.net.parameters(), limit)

    def told(self, step: int) -> bool:
        """Whether the loss of a step, counted from 1, is read; reading it makes a GPU wait."""
        return step % self.recipe.log_every == 0 or step == self.stage.steps or self._late

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A weight that has been NaN once stays NaN: it is noticed at the next loss that is `told`, or before by
        `checked_state`, so that it never reaches a checkpoint."""

        def closure() -> Any:
            result = optimizer_closure()
            if not self.told(self.step + 1):
                return result
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
            self._update_average(self.average)
        if self.told(self.step):
            logged = {"loss": self.last_loss, "lr": self.rate}
            self.log_dict(logged, prog_bar=True)
            self.log("step", float(self.step))  # Lightning's own count begins anew after an interruption
        self._after_step(self)

    @torch.no_grad()
    def _update_average(self, average: MemNet) -> None:
        """The first steps count little: for them the average is over fewer steps than `ema` stands for."""
        n = self.averaged
        decay = min(self.stage.ema, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(list(average.parameters()), list(self.net.parameters()), 1 - decay)
        self.averaged += 1

    @torch.no_grad()
    def result(self) -> MemNet:
        """A copy of the trained network (averaged, with settled statistics, where the stage asks for that), in eval mode."""
        net = MemNet(dataclasses.replace(self.recipe.network, num_recursions=self.stage.recursions)).to(self.device)
        net.load_state_dict(self.net.state_dict())
        if self.average is not None:
            for p, averaged in zip(net.parameters(), self.average.parameters(), strict=True):
                p.copy_(averaged)
        if self.stage.settle and self._batch_statistics:
            # Batches that training does not see. In float32: statistics of rounded activations are not wanted.
            first = self.stage.steps * self.stage.accumulate
            with torch.autocast(self.device.type, enabled=False):
                update_bn((self.samples(first + i)[0] for i in range(self.stage.settle)), net.train())
        return net.eval()


def _keep_memory() -> None:
    """Freed memory stays with the process. By itself glibc gives the maps of a step back to the system, which hands them out
    again page by page: a tenth to a fifth of a step's time on a CPU. Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _plain_heads(net: MemNet, x: Tensor) -> list[Tensor]:
    return net.heads(x)
