"""A training from its recipe to its result: stages one after the other, checkpoints, stopping and going on.

In the output folder: `last.ckpt` (all that is needed to go on), `best.result` (the validated network of the running stage with
the highest mean PSNR), `stageN.result` of finished stages, `result` and `weights.safetensors` of the last, `stopped.result`
(the network as it was when the minutes of a leg were over), and what TensorBoard reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memnet_fast import __version__, files
from memnet_fast.config import MemNetConfig
from memnet_fast.errors import (
    BackendUnavailable,
    CheckpointMismatch,
    InputError,
    MemNetError,
    MissingExtra,
    OutputError,
    ProcessLost,
)
from memnet_fast.evaluation import mean_psnr
from memnet_fast.fused import fuse
from memnet_fast.reference import MemNet
from memnet_fast.tasks import task as find_task
from memnet_fast.training import images as data
from memnet_fast.training.recipe import Recipe, differences
from memnet_fast.training.results import grow, load_result, read_state, save_result, write_state
from memnet_fast.training.samples import least_side
from memnet_fast.weights import bundled, save_weights

try:
    import lightning
    from lightning.pytorch.callbacks import Callback, TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from memnet_fast.training.module import StageModule, check_stage
except ImportError as error:
    raise MissingExtra(f"training needs Lightning and TensorBoard ({error}); pip install 'memnet_fast[train]'") from error

_VERSION = 2
# In the environment of the processes that Lightning starts: the id of the first.
_LAUNCHER = "_MEMNET_TRAINING_LAUNCHER"
_STOPPED = "stopped.result"
# Of a recipe, what each machine may have its own of.
_OWN = ("name", "data", "validation", "output", "init")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """accelerator: "auto", "cpu" or "cuda". devices: on each machine; nodes: machines. bar: show a progress bar."""

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    bar: bool = False


@dataclass(frozen=True)
class Outcome:
    """signal: that ended the run early, or 0. done: all stages are. stage, step: where it stands."""

    done: bool
    signal: int
    stage: int
    step: int
    history: list[dict[str, Any]]


def _first_process() -> bool:
    """Also before processes talk to each other: Lightning reads it from the environment."""
    return getattr(rank_zero_only, "rank", 0) == 0


class _Stopping:
    """Why a run ends before its time: a signal, or the minutes are over."""

    def __init__(self, minutes: float | None) -> None:
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal = 0

    @property
    def due(self) -> bool:
        return bool(self.signal) or (self.deadline is not None and time.monotonic() >= self.deadline)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and the first SIGINT end the run after the step at hand."""

        def note(number: int, frame: object) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield  # the host decides about signals
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    override: bool = False,
    max_minutes: float | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008  (frozen)
) -> Outcome:
    """Trains a recipe, or goes on with it.

    resume: go on from last.ckpt in the output folder, if there is one; without it a folder that has one is refused. On CPUs
    the weights are then, bit by bit, those of a training that was never interrupted (with the same processes); a GPU may add
    up gradients in another order.
    override: also with a changed recipe. max_minutes: stop after that time, with a checkpoint and stopped.result.

    Raises InputError (recipe, data, folder in use), BackendUnavailable (fewer GPUs than asked for) and CheckpointMismatch
    (changed recipe or data; lists the changes), before anything is made unless several processes find different data;
    NumericError (the loss is not finite; last.ckpt keeps an earlier state), ProcessLost (of several processes one ended; all
    do), OutputError.
    """
    _require_devices(hardware)
    if not recipe.data:
        raise InputError("the recipe names no data; add data=FOLDER")
    if not recipe.output:
        raise InputError("the recipe names no output folder; add output=FOLDER")
    if max_minutes is not None and not max_minutes > 0:
        raise InputError(f"max_minutes must be positive, got {max_minutes}")
    world = hardware.devices * hardware.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) != world:
        # Each of its processes would train alone.
        started = os.environ["WORLD_SIZE"]
        raise InputError(f"torchrun started {started} processes, devices x nodes are {world}; give --devices and --nodes")
    for stage in recipe.stages:
        if stage.batch % world:
            raise InputError(f"a batch of {stage.batch} cannot be shared by {world} processes")
        if stage.batch == world and stage.patch == 1 and stage.statistics == "batch":
            raise InputError("one pixel has no statistics to normalise by; take a larger batch or patch")
    stopping = _Stopping(max_minutes)
    least = max(least_side(recipe.levels, stage.patch) for stage in recipe.stages)
    images = data.load_gray_images(recipe.data, least)
    # For sr a border as wide as the scale is not compared: of an image three times as wide, something is left.
    compared = 3 * int(max(find_task(recipe.task).levels)) if recipe.task == "sr" else 1
    validation = data.load_gray_images(recipe.validation, compared) if recipe.validation else []
    output = Path(recipe.output).expanduser()
    with contextlib.ExitStack() as stack:
        ending = stack.enter_context(_ending_with_launcher())
        run = _Run(recipe, output, images, validation, hardware, stopping, ending)
        # What cannot begin is refused before anything is made.
        start = None if run.begun else run.start(resume, override)
        if _first_process():
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the output folder {output}: {error.strerror or error}") from error
            stack.enter_context(_locked(output))
        if start is None or run.begun:  # read when no other training writes it any more
            start = run.start(resume, override)
        stack.enter_context(stopping.listening())
        outcome = run.stages(*start)
    if _first_process():
        if outcome.done:
            _log.info("done: %s/result and weights.safetensors", recipe.output)
        else:
            _log.info("stopped in stage %d after step %d; --resume auto goes on", outcome.stage + 1, outcome.step)
    return outcome


def _require_devices(hardware: Hardware) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if hardware.accelerator == "cpu" or (hardware.accelerator == "auto" and not there):
        return
    if hardware.devices > there:
        raise BackendUnavailable("cuda", f"training was to have {hardware.devices} CUDA devices, PyTorch sees {there}")


def _launcher() -> int | None:
    """The process that started this one as a part of its training. What the first process starts for another purpose inherits
    its environment, and in there the rank 0."""
    text = os.environ.get(_LAUNCHER)
    return None if text is None or os.environ.get("LOCAL_RANK", "0") == "0" else int(text)


@contextlib.contextmanager
def _ending_with_launcher() -> Iterator[threading.Event]:
    """A process that Lightning started ends with the one that started it: that may be killed while this one waits for it, and
    the first meeting and NCCL's exchanges wait for minutes. The other way round Lightning itself looks after. Not any more
    when the event is set: then each may leave when it likes."""
    launcher, ending = _launcher(), threading.Event()

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            if ending.wait(1):
                return
        if not ending.is_set():
            os.write(2, b"memnet: error: the first process of this training ended\n")
            os._exit(1)

    if launcher is not None:
        threading.Thread(target=watch, args=(launcher,), daemon=True).start()
        del os.environ[_LAUNCHER]  # what this process starts for another purpose has nothing to do with it
    try:
        yield ending
    finally:
        ending.set()
        if launcher is not None:
            os.environ[_LAUNCHER] = str(launcher)


@contextlib.contextmanager
def _several(world: int) -> Iterator[None]:
    """Around what several processes do together."""
    if world == 1:
        yield
        return
    # Lightning says there which process ended before it ends the others, and what it ends says nothing any more.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    before = os.environ.get(_LAUNCHER)
    # The first process, whose environment Lightning hands on to the others.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    except RuntimeError as error:
        # Gloo has no kind of error of its own.
        lost = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
        if isinstance(error, MemNetError) or not lost:
            raise
        text = "another process of this training ended (what it said comes before this line); --resume auto goes on"
        raise ProcessLost(text) from error
    finally:
        os.environ.pop(_LAUNCHER, None)
        if before is not None:
            os.environ[_LAUNCHER] = before


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Lightning advises about loaders, loggers and devices of other kinds of training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One training for each folder. The lock goes with the process, however that ends."""
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training writes into {folder}; choose another output") from None
        except OSError as error:
            raise OutputError(f"cannot lock {folder}: {error.strerror or error}") from error
        files.sweep(folder)
        yield


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        images: list[torch.Tensor],
        validation: list[torch.Tensor],
        hardware: Hardware,
        stopping: _Stopping,
        ending: threading.Event,
    ) -> None:
        self.recipe, self.output, self.images, self.validation = recipe, output, images, validation
        self.hardware, self.stopping, self.ending = hardware, stopping, ending
        self.digest = data.digest(images)
        self.task = find_task(recipe.task)
        with _without_advice():  # before that, no process knows whether it is the first of several machines
            self.device = self._trainer(logger=False).strategy.root_device
        self.history: list[dict[str, Any]] = []
        self.stage = 0
        self.best = -math.inf
        self._next: MemNet | None = None
        self._stopped = False
        self._saved = time.monotonic()

    @property
    def last(self) -> Path:
        return self.output / "last.ckpt"

    @property
    def begun(self) -> bool:
        return os.path.exists(self.last)  # Path.exists raises where it may not look

    @property
    def world(self) -> int:
        """Processes."""
        return self.hardware.devices * self.hardware.nodes

    # Where a run begins

    def start(self, resume: bool, override: bool) -> tuple[MemNet, dict[str, Any] | None]:
        """The network of the stage to begin with, and the state within it, if it has one. Raises also where one of the stages
        to come cannot be trained here."""
        if self.begun:
            if not resume:
                raise InputError(f"{self.output} holds a training already; go on with --resume auto or choose another output")
            net, state = self._resumed(override)
        else:
            net, state = self._new(), None
        for stage in self.recipe.stages[self.stage :]:
            check_stage(stage, net, self.device, self.world)
        return net, state

    def _new(self) -> MemNet:
        first = self.recipe.stages[0].recursions
        config = MemNetConfig.from_dict({**self.recipe.network.to_dict(), "num_recursions": first})
        if not self.recipe.init:
            torch.manual_seed(self.recipe.seed)
            net = MemNet.on_cpu(config)
            if self.recipe.head_start and net.head_weights is not None:
                torch.nn.init.constant_(net.head_weights, self.recipe.head_start)
            if self.recipe.identity_start:
                for parameter in net.recon.parameters():
                    torch.nn.init.zeros_(parameter)
            torch.nn.init.constant_(net.first.bn.bias, self.recipe.first_shift)
            return net
        net, self.history = load_result(bundled().get(self.recipe.init) or Path(self.recipe.init).expanduser())
        if self.recipe.stages[0].statistics == "fixed" and net.config.num_recursions < first:
            raise InputError(f"stage 1 has statistics = 'fixed', and {self.recipe.init} has none for {first} recursions")
        net = grow(net, first)
        if net.config != config:
            changes = differences(net.config.to_dict(), config.to_dict())
            raise CheckpointMismatch(f"{self.recipe.init} holds another network: {'; '.join(changes)}")
        return net

    def _resumed(self, override: bool) -> tuple[MemNet, dict[str, Any] | None]:
        saved = read_state(self.last, ("version", "recipe", "data", "config", "stage", "history", "best", "state"))
        if saved["version"] != _VERSION:
            raise CheckpointMismatch(f"{self.last} has version {saved['version']}, this program reads version {_VERSION}")
        changes = differences(json.loads(saved["recipe"]), self.recipe.to_dict())
        if saved["data"] != self.digest:
            changes.append("data: other images")
        fixed = [change for change in changes if change.startswith(("network.", "task"))]
        if fixed:
            raise CheckpointMismatch(f"{self.last} cannot go on as another network or task ({'; '.join(fixed)})")
        if changes and not override:
            raise CheckpointMismatch(f"the recipe differs from that of {self.last} ({'; '.join(changes)}); --override goes on")
        if changes:
            _log.warning("going on with changes: %s", "; ".join(changes))
        self.stage, self.best = saved["stage"], saved["best"]
        self.history = json.loads(saved["history"])
        if self.stage >= len(self.recipe.stages):
            raise CheckpointMismatch(f"{self.last} is in stage {self.stage + 1}, the recipe has {len(self.recipe.stages)}")
        net = MemNet.on_cpu(MemNetConfig.from_dict(saved["config"]))
        if net.config.num_recursions != self.recipe.stages[self.stage].recursions:
            raise CheckpointMismatch(f"{self.last} holds a network with {net.config.num_recursions} recursions")
        if "optimizer" in saved["state"]:
            self._check_end(json.loads(saved["recipe"])["stages"][self.stage], saved["state"])
            return net, saved["state"]
        net.load_state_dict(saved["state"]["net"])  # the start of a stage
        return net, None

    def _check_end(self, before: dict[str, Any], state: dict[str, Any]) -> None:
        """A changed recipe ends the stage at hand where it is trained to its end, and there alone. before: as the stage was."""
        stage, number, step = self.recipe.stages[self.stage], self.stage + 1, state["step"]
        ended = step >= before["steps"] or 0 < 60 * before.get("minutes", 0) <= state["seconds"]
        ends = step >= stage.steps or 0 < 60 * stage.minutes <= state["seconds"]
        if ends and not ended:
            text = f"{self.last} is at step {step} of stage {number}, where the recipe has ended it; give the stage more"
            raise CheckpointMismatch(f"{text} steps or minutes")
        if not ends and stage.statistics == "fixed" and before.get("statistics", "batch") == "batch":
            # The running ones, of the last few batches, are those of no network that anybody would use.
            text = f"{self.last} is within stage {number}, which began with statistics of batches"
            raise CheckpointMismatch(f"{text}; 'fixed' is for a stage of its own")
        if ended and not ends:
            self.history.pop()  # what it says of the stage is said again at the end
        elif ended and number < len(self.recipe.stages):
            text = f"the training of {self.last} is done; for another stage give init={self.output / 'result'}"
            raise CheckpointMismatch(f"{text} and another output")

    # How it goes on

    def stages(self, net: MemNet, state: dict[str, Any] | None) -> Outcome:
        while True:
            module = StageModule(net, self.recipe, self.stage, self.images, self._after_step)
            if state is not None:
                module.restore(state)
            if not module.ended:
                self._fit(module)
            if not module.ended:
                return Outcome(False, self.stopping.signal, self.stage, module.step, self.history)
            if self._next is None:
                return Outcome(True, 0, self.stage, module.step, self.history)
            net, state, self._next = self._next, None, None
            self.stage += 1
            if self._stopped:
                return Outcome(False, self.stopping.signal, self.stage, 0, self.history)

    def _fit(self, module: StageModule) -> None:
        remaining = module.stage.steps - module.step
        callbacks: list[Callback] = [_Watch(self)]
        if self.hardware.bar:
            callbacks.append(TQDMProgressBar())
        with _without_advice():
            trainer = self._trainer(
                precision="bf16-mixed" if module.stage.precision == "bf16" else "32-true",
                max_steps=remaining,
                limit_train_batches=remaining * module.stage.accumulate,
                accumulate_grad_batches=module.stage.accumulate,
                sync_batchnorm=module.stage.sync_batchnorm,
                callbacks=callbacks,
                logger=TensorBoardLogger(self.output, name="tensorboard", version=f"stage{self.stage + 1}"),
                log_every_n_steps=1,  # the module decides; Lightning's own count begins anew after an interruption
            )
            with _several(self.world):
                trainer.fit(module)

    def _trainer(self, **options: Any) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator=self.hardware.accelerator,
            devices=self.hardware.devices,
            num_nodes=self.hardware.nodes,
            strategy="ddp" if self.world > 1 else "auto",
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self.hardware.bar,
            **options,
        )

    def _after_step(self, module: StageModule) -> None:
        done = module.ended
        if module.told(module.step):
            self._say(module, f"loss {module.last_loss:.5f}, learning rate {module.rate:.3g}")
        if self.recipe.validate_every and module.step % self.recipe.validate_every == 0 and not done:
            self._validate(module, module.result())
        stop = module.trainer.strategy.reduce_boolean_decision(self.stopping.due, all=False)
        if done:
            self._finish(module)
        elif stop or time.monotonic() - self._saved >= 60 * self.recipe.save_minutes:
            self._save(self.stage, module.net.config, module.checked_state())
            if stop and not self.stopping.signal and _first_process():  # who sends a signal does not wait long
                record = {**self._record(module), "step": module.step}
                save_result(module.result().cpu(), [*self.history, record], self.output / _STOPPED)
        if stop or (done and self._next is None):
            # The first process has saved; it leaves when the others know that it may.
            module.trainer.strategy.barrier()
            self.ending.set()
            module.trainer.strategy.barrier()
        self._stopped = stop
        module.trainer.should_stop = stop or done

    def _say(self, module: StageModule, text: str) -> None:
        if _first_process():
            _log.info("stage %d, step %d of %d: %s", self.stage + 1, module.step, module.stage.steps, text)

    def _save(self, stage: int, config: MemNetConfig, state: dict[str, Any]) -> None:
        self._saved = time.monotonic()
        if _first_process():
            checkpoint = {"version": _VERSION, "program": __version__, "recipe": json.dumps(self.recipe.to_dict())}
            checkpoint |= {"data": self.digest, "config": config.to_dict(), "stage": stage, "best": self.best}
            write_state(self.last, {**checkpoint, "history": json.dumps(self.history), "state": state})

    def _validate(self, module: StageModule, net: MemNet) -> dict[str, dict[str, float]]:
        """Measures the module's result and keeps the best; on the first process, while the others wait."""
        tables: dict[str, dict[str, float]] = {}
        if _first_process() and self.validation:
            tables = self._measure(net)
            mean = sum(tables["psnr"].values()) / len(tables["psnr"])
            self._say(module, "PSNR " + ", ".join(f"{label} {value:.2f}" for label, value in tables["psnr"].items()))
            if module.logger is not None:
                values = {f"psnr/{label}": value for label, value in tables["psnr"].items()}
                module.logger.log_metrics(values, module.step)
            if mean > self.best:  # never of NaN
                self.best = mean
                record = {**self._record(module), **tables, "step": module.step}
                save_result(net, [*self.history, record], self.output / "best.result")
        module.trainer.strategy.barrier()
        return tables

    def _measure(self, net: MemNet) -> dict[str, dict[str, float]]:
        fused = fuse(net)  # the one that users run
        restored, degraded = {}, {}
        for level in self.task.levels:
            label = self.task.label(level)
            restored[label], degraded[label] = mean_psnr(fused, self.validation, self.task, level)
        return {"psnr": restored, "psnr_degraded": degraded}

    def _record(self, module: StageModule) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        device = torch.cuda.get_device_name() if module.device.type == "cuda" else "CPU"
        new = self.stage == 0 and not self.recipe.init
        return {
            "name": f"{self.recipe.name} stage {self.stage + 1}",
            "task": self.recipe.task,
            "levels": {k: v for k, v in recipe["levels"].items() if k != "task"},
            **recipe["stages"][self.stage],
            **({key: recipe[key] for key in ("head_start", "identity_start", "first_shift")} if new else {}),
            "seed": self.recipe.seed,
            "images": len(self.images),
            "images_sha256": self.digest,
            "device": device,
            "kernels": module.kernels,
            "processes": self.world,
            "hours": round(module.elapsed() / 3600, 3),
            "program": __version__,
        }

    def _finish(self, module: StageModule) -> None:
        """The stage's network, the same on every process; its files come before the checkpoint that says it is done."""
        state = module.checked_state()
        net = module.result()
        tables = self._validate(module, net)
        net = net.cpu()
        self.history = [*self.history, {**self._record(module), **tables}]
        last = self.stage + 1 == len(self.recipe.stages)
        if _first_process():
            save_result(net, self.history, self.output / ("result" if last else f"stage{self.stage + 1}.result"))
        if last:
            if _first_process():
                save_weights(net, self.output / "weights.safetensors", {"task": self.task.name, "recipe": self.history})
                (self.output / _STOPPED).unlink(missing_ok=True)
            self._save(self.stage, net.config, state)
            return
        self._next, self.best = grow(net, self.recipe.stages[self.stage + 1].recursions), -math.inf
        self._save(self.stage + 1, self._next.config, {"net": self._next.state_dict()})


class _Watch(Callback):
    """What Lightning would do otherwise: its handler of SIGTERM talks to other processes from within the signal."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if _first_process():
            kind, precision = ("native", "fp32") if pl_module.kernels == "native" else ("PyTorch's", pl_module.stage.precision)
            _log.info("stage %d: %s kernels, %s", self._run.stage + 1, kind, precision)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before DDP, which copies the weights of the first process, and nothing else in which others may differ."""
        run = self._run
        recipe = {key: value for key, value in run.recipe.to_dict().items() if key not in _OWN}
        shared = {
            "see the same training images": run.digest,
            "follow the same recipe": _sha256(json.dumps(recipe)),
            "go on from the same step; every machine needs the output folder": _sha256(f"{run.stage} {pl_module.step}"),
        }
        own = torch.tensor([list(bytes.fromhex(digest)) for digest in shared.values()], device=trainer.strategy.root_device)
        every = trainer.strategy.all_gather(own).reshape(-1, *own.shape)
        for what, same in zip(shared, (every == every[0]).all(2).all(0).tolist(), strict=True):
            if not same:
                raise InputError(f"the processes do not {what}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
