"""Accelerators: which cards a torch can use, told apart by its own list; and proofs on what is here."""

from __future__ import annotations

import pytest
import torch

from hubmap_kit import experiment
from hubmap_kit.errors import KernelError
from hubmap_kit.kernel.accelerator import PROFILES, adapt, check_supported, detect, profile, prove, prove_device
from hubmap_kit.publish.kernels import SHAPES

BUILD = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
# Lists as torch gives them: the last with the P100, and one of an image of late 2026.
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "arches", "runs"),
    [
        ((6, 0), CU126, True),
        ((6, 0), CU128, False),
        ((6, 1), CU126, True),
        ((7, 5), CU128, True),
        ((7, 0), CU128, False),
        ((8, 9), CU128, True),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((12, 1), ["compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((8, 0), ["sm_86"], False),
        ((10, 3), ["sm_100f"], True),
        ((7, 5), [], False),
        ((7, 5), ["gfx90a"], False),
    ],
)
def test_which_cards_a_build_runs_on(capability: tuple[int, int], arches: list[str], runs: bool) -> None:
    if runs:
        check_supported("a card", capability, arches)
        return
    with pytest.raises(
        KernelError,
        match=rf"sm_{capability[0]}{capability[1]}, and this torch .* has no kernels for it.*choose NvidiaTeslaT4",
    ):
        check_supported("a card", capability, arches)


@pytest.mark.skipif(not BUILD, reason="this torch is built without CUDA")
def test_the_installed_torch_has_the_t4_and_not_the_p100() -> None:
    assert BUILD is not None
    check_supported("Tesla T4", (7, 5), BUILD.split())
    with pytest.raises(KernelError, match="Tesla P100-PCIE-16GB, sm_60"):
        check_supported("Tesla P100-PCIE-16GB", (6, 0), BUILD.split())


def test_the_cpu_proves_itself() -> None:
    assert prove("cpu") == [torch.device("cpu")]
    with pytest.raises(KernelError, match="meta cannot multiply two matrices"):
        prove_device(torch.device("meta"))
    with pytest.raises(KernelError, match="accelerator is 'tpu'; expected one of t4x2, p100, cuda, cpu"):
        prove("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
@pytest.mark.parametrize("name", ["t4x2", "p100", "cuda"])
def test_a_card_that_is_not_there_is_one_sentence(name: str) -> None:
    assert detect() is PROFILES["cpu"]
    with pytest.raises(KernelError, match=f"the accelerator {name} was asked for, but this session has no card"):
        prove(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card here")
def test_every_card_proves_itself() -> None:
    assert len(prove("cuda")) == detect().devices == torch.cuda.device_count()
    assert torch.cuda.current_device() == 0


def test_profiles_name_kaggles_machines_as_publishing_does() -> None:
    assert {name: PROFILES[name].machine_shape for name in SHAPES} == SHAPES


def test_only_what_the_experiment_leaves_open_is_adapted() -> None:
    open_, chosen = (
        experiment.load("baseline"),
        experiment.load("baseline", ["training.workers=3", "inference.batch_size=1"]),
    )
    assert adapt(chosen, profile("t4x2"), 2) == chosen
    adapted = adapt(open_, profile("t4x2"), 2)
    assert adapted.inference.batch_size == 2 * open_.inference.batch_size and adapted.training.workers >= 1
    assert adapted.model_copy(update={"training": open_.training, "inference": open_.inference}) == open_
    assert adapt(open_, profile("cpu"), 1) == open_
