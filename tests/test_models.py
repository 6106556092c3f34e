"""Names of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memnet_fast as mf
from memnet_fast.config import PRESETS


def test_presets_are_listed_and_made() -> None:
    assert set(PRESETS) <= set(mf.list_models())
    net = mf.create_model("memnet_m6r6", channels=8, num_recursions=2)
    assert net.config == mf.MemNetConfig(channels=8, num_recursions=2) and not net.training


def test_defaults_of_the_program_have_no_effect(tmp_path: Path) -> None:
    mf.save_weights(mf.create_model("memnet_m6r6", channels=4, num_memory_blocks=1), tmp_path / "w")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        made = mf.create_model("memnet_m6r6", channels=4, num_memory_blocks=1), mf.load_weights(tmp_path / "w")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for net in made:
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in net.parameters())


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(mf.InputError, match="memnet_m6r6"):
        mf.create_model("memnet_m6r7")
    with pytest.raises(mf.InputError, match="nothing_like_it"):
        mf.create_model("nothing_like_it")
    with pytest.raises(mf.InputError, match="unknown model"):
        mf.create_model("memnet_m6r6.nonsense")


def test_unknown_fields_are_named() -> None:
    with pytest.raises(mf.InputError, match="chanels"):
        mf.create_model("memnet_m6r6", chanels=8)


def test_weights_are_loaded_by_name_only() -> None:
    with pytest.raises(mf.InputError, match="no weights of its own"):
        mf.create_model("memnet_m10r10", pretrained=True)


@pytest.mark.parametrize("name", mf.list_models(pretrained=True))
def test_bundled(name: str) -> None:
    net = mf.create_model(name)
    assert not net.training
    with pytest.raises(mf.InputError, match="cannot be changed"):
        mf.create_model(name, channels=8)
    with pytest.raises(mf.InputError, match="unknown model"):
        mf.create_model(name + "x")
    random = mf.create_model(name, pretrained=False)
    assert not (random.recon.weight == net.recon.weight).all()


def test_every_public_name_exists() -> None:
    for name in mf.__all__:
        assert getattr(mf, name) is not None
    with pytest.raises(AttributeError):
        mf.nothing  # noqa: B018
