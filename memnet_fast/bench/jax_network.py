"""The network in JAX, compiled by XLA, from a plan: NHWC, one function for one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock, lower
from memnet_fast.weights import load_weights


def network(plan: FusedPlan, dtype: str) -> Any:
    """A function of an image [N, H, W, C] float32 -> the same kind. dtype: of everything but the image itself."""
    import jax.numpy as jnp
    from jax import lax

    def conv(x: Any, name: str) -> Any:
        weight = jnp.asarray(plan.weights[name].permute(2, 3, 1, 0).numpy(), x.dtype)
        return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def vector(name: str, like: Any) -> Any:
        return jnp.asarray(plan.weights[name].numpy().reshape(-1), like.dtype)

    def bn_relu(x: Any, op: Any) -> Any:
        return jnp.maximum(x * vector(op.scale, x) + vector(op.shift, x), 0)

    def forward(image: Any) -> Any:
        slots: dict[int, Any] = {}
        for op in plan.ops:
            match op:
                case FirstConv():
                    x = bn_relu(image.astype(dtype), op)
                    slots[op.dst] = conv(x, op.weight) + vector(op.bias, x)
                case ResidualBlock():
                    x = slots[op.src]
                    t = conv(bn_relu(x, op), op.weight_a) + vector(op.bias_a, x)
                    slots[op.dst] = x + conv(jnp.maximum(t, 0), op.weight_b) + vector(op.bias_b, x)
                case Gate():
                    x = bn_relu(jnp.concatenate([slots[s] for s in op.srcs], -1), op)
                    weight = jnp.asarray(plan.weights[op.weight].flatten(1).T.numpy(), x.dtype)
                    slots[op.dst] = x @ weight + vector(op.bias, x)
                case Reconstruct():
                    out = image * float(plan.weights[op.skip])
                    scale, shift = plan.weights[op.scale], plan.weights[op.shift]
                    for j, slot in enumerate(op.srcs):
                        x = slots[slot]
                        s, t = (jnp.asarray(v[j].numpy(), x.dtype) for v in (scale, shift))
                        y = conv(jnp.maximum(x * s + t, 0), op.weight).astype(image.dtype) + vector(op.bias, image)
                        out = out + float(plan.weights[op.head][j]) * y
                    return jnp.clip(out, 0, 1) if plan.config.clamp else out
        raise ValueError("the plan has no result")

    return forward


class JaxRunner:
    """On JAX's first device; its time is the host's, until the result is there."""

    in_flight, device = 1, "cpu"

    def __init__(self, settings: dict[str, Any], dtype: str) -> None:
        import jax

        wanted = "gpu" if settings["device"].startswith("cuda") else "cpu"
        self._jax, self._place = jax, jax.devices(wanted)[0]
        net = load_weights(Path(settings["folder"]) / "weights.safetensors")
        self._function = jax.jit(network(lower(net), dtype))
        self._image: Any = None
        self._result: Any = None

    def load(self, image: np.ndarray) -> None:
        self._image = self._jax.device_put(np.ascontiguousarray(image.transpose(0, 2, 3, 1)), self._place)

    def run(self) -> None:
        self._result = self._function(self._image).block_until_ready()

    def result(self) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self._result).transpose(0, 3, 1, 2))

    def device_peak_mib(self) -> float | None:
        found = self._place.memory_stats() if self._place.platform == "gpu" else None
        return found["peak_bytes_in_use"] / 2**20 if found else None
