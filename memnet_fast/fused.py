"""`fuse` and `FusedMemNet`: a MemNet for inference that runs as a plan over one workspace."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from memnet_fast import backends, engine, ops
from memnet_fast.errors import BackendUnavailable, InputError
from memnet_fast.plan import batch_norm_eps, require_plain, require_structure
from memnet_fast.reference import MemNet, check_input
from memnet_fast.watch import Watch

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fuse(net: nn.Module, backend: str = "auto", precision: str = "auto", algorithm: str = "auto") -> FusedMemNet:
    """A fused network for inference that shares the parameters of `net` (a MemNet, or a FusedMemNet to fuse otherwise).

    backend: "auto", "cuda", "triton", "cpu", "torch". precision: "auto", "fp32", "tf32", "bf16", "fp16", "fp8"; cpu
    computes in fp32, with AVX512-BF16 also in bf16; cuda in fp16 and bf16, on Hopper fp8. fp8 takes its scales from the running
    statistics: the weights must be loaded before, and a small test image, restored on the CPU in fp8 and float32, shows
    whether they fit (see fp8_gate); at the first call after a change of the weights it is asked again (the backend cuda, which
    does not read values, misses changes through `parameter.data`).
    algorithm: "auto", "winograd" or "direct", for the 3x3 convolutions of the CPU backend.
    Puts `net` into eval mode. Raises InputError for what is not a plain MemNet, BackendUnavailable (with the reason) for a
    request that cannot be met.
    """
    if isinstance(net, FusedMemNet):
        net = net.reference
    if not isinstance(net, MemNet):
        raise InputError(f"only a MemNet can be fused, not {type(net).__name__}")
    return FusedMemNet(net, backend, precision, algorithm)


# What intercepts operators (a tracer, torch.func, a dispatch mode, fake tensors) adds a key of its own to these.
_NOTHING_INTERCEPTS = frozenset(
    keys.raw_repr()
    for keys in (
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect),  # in inference mode
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView),
    )
)


def _is_plain_call(x: Tensor) -> bool:
    """Whether nobody would notice that an operator on x is not called as an operator."""
    return (
        type(x) is Tensor
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _NOTHING_INTERCEPTS
        and not torch._is_functional_tensor(x)
        and not torch.autograd._profiler_enabled()
    )


def _has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp) passes through x."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


class FusedMemNet(nn.Module):
    """MemNet as a list of fused operations over one preallocated workspace; same call as the reference.

    forward(x): x [N, C_in, H, W], values in [0, 1], any H, W >= 1, any strides, float32, float16 or bfloat16, on the device
    of the parameters -> [N, C_out, H, W], contiguous, dtype and device of x. Raises InputError for other input.

    * A changed parameter or running statistic is noticed at the next call.
    * In training mode (of this module or of any of its layers), for input that requires grad while grad is enabled, and for
      input with a tangent, the reference computes; otherwise the result carries no gradient, also not for the parameters.
    * Safe to call from several threads; each call in flight has its own workspace, and the largest is kept
      (`release_workspace` gives it back).
    """

    def __init__(self, reference: MemNet, backend: str = "auto", precision: str = "auto", algorithm: str = "auto") -> None:
        super().__init__()
        self.reference = reference
        self._request = (backend, precision, algorithm)
        self.eval()
        require_plain(reference)
        require_structure(reference)
        self._attach()
        choice = self._choice()
        if choice.precision == "fp8":
            if self._device().type == "meta":
                reason = "fp8 takes its scales from the running statistics, and on meta there are none"
                raise BackendUnavailable(choice.backend, reason)
            # Looks at the weights, now and at the first call after they changed.
            engine.engine(self._spec).packed(self._state())

    def _attach(self) -> None:
        owner = uuid.uuid4().hex
        self._attached_to = self.config, batch_norm_eps(self.reference)
        self._spec = engine.make_spec(*self._attached_to, *self._request, owner)
        self._watch: Watch | None = None
        # Kept, because torch.compile cannot trace how they are found.
        self._names = engine.state_names(self.config)
        weakref.finalize(self, engine.forget, self._spec)

    @property
    def config(self) -> Any:
        return self.reference.config

    @property
    def backend(self) -> str:
        """The backend that runs."""
        return self._choice().backend

    @property
    def precision(self) -> str:
        return self._choice().precision

    @property
    def algorithm(self) -> str:
        return self._choice().algorithm

    def _choice(self) -> backends.Choice:
        return backends.choose(self.config, self._device(), *self._request)

    def _device(self) -> torch.device:
        return self.reference.first.conv.weight.device

    def _state(self) -> list[Tensor]:
        state = self.reference.state_dict(keep_vars=True)
        return [state[name].detach() for name in self._names]

    def workspace_bytes(self, n: int, h: int, w: int) -> int:
        """Bytes of workspace that a call with [n, C_in, h, w] needs (a large batch is computed in several passes)."""
        with engine.engine(self._spec).lock:
            _, state = self._look()
        choice, packed = engine.engine(self._spec).packed(state)
        return engine.workspace_bytes(packed, n, h, w, choice.backend)

    def release_workspace(self) -> None:
        """Frees the workspaces kept for the next call."""
        engine.engine(self._spec).release()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.reference.first.conv.weight
        check_input(x, self.config, INPUT_DTYPES, weight.device)
        compiling = torch.compiler.is_compiling()
        state: Sequence[Tensor]
        if compiling:
            require_plain(self.reference)
            # What `_look` does then cannot be traced.
            if self._attached_to != (self.config, batch_norm_eps(self.reference)):
                raise InputError("an eps of the network has changed; call it once before it is compiled")
            trained, state = any(m.training for m in self.modules()), self._state()
        else:
            # Under the lock of load_state_dict and to(), which may put one tensor after the other in place of the old.
            with engine.engine(self._spec).lock:
                trained, state = self._look()
        if trained or (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x):
            return self.reference(x.to(weight.dtype)).to(x.dtype)
        if x.shape[0] == 0 or x.device.type == "meta":
            return x.new_empty((x.shape[0], self.config.out_channels, *x.shape[2:]))
        if compiling:
            return ops.forward(x.detach(), state, self._spec)
        if not _is_plain_call(x):
            return ops.forward(x.detach(), [t.detach() for t in state], self._spec)
        # The operator in this case does nothing but this, and takes a tenth of a millisecond for its hundreds of arguments.
        return engine.engine(self._spec).run(x.detach(), state)

    def _look(self) -> tuple[bool, Sequence[Tensor]]:
        """Whether a layer is in training mode, and the tensors that the next call computes with."""
        net, watch = self.reference, self._watch
        state = watch.state() if watch is not None and watch.net is net else None
        if watch is None or state is None:
            watch = Watch(net, engine.state_names(net.config))
            state = watch.tensors
            if self._attached_to != (net.config, watch.eps):
                engine.forget(self._spec)
                self._attach()
            self._watch = watch
        disturbed = watch.disturbed()
        if disturbed:
            require_plain(net)
        return self.training or disturbed, state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; a call in another thread sees all of the old weights or all of the new ones."""
        with engine.engine(self._spec).lock:
            return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if "_spec" not in self.__dict__:
            return super()._apply(fn, recurse)
        runner = engine.engine(self._spec)
        with runner.lock:
            device = self._device()
            super()._apply(fn, recurse)
            if self._device() != device:
                self._watch = None  # it holds buffers
                runner.settle(self._device())
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the other side of a pickle, is a network of its own with an engine of its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_spec", "_watch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in zip(("backend", "precision", "algorithm"), self._request, strict=True))
