"""The folder of benchmarks/results/ that belongs to this machine."""

from __future__ import annotations

from pathlib import Path

from memnet_fast.bench import facts


def results_folder(gpu: str | None = None) -> Path:
    """Named after the GPU, or else after the CPU and the number of CPUs in use; made if it is not there."""
    cpu = facts.cpu()
    name = facts.folder_name(gpu) if gpu else f"{facts.folder_name(cpu['model'])}-{cpu['cpus']}cpu"
    folder = Path(__file__).parent / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
