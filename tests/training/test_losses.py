"""Losses against their formulas, their sums, and what they do with empty tiles and half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hubmap_kit.config import LOSSES, TrainingConfig
from hubmap_kit.errors import ConfigError
from hubmap_kit.training.losses import build_loss


def batch(seed: int = 0, empty: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits, masks = torch.randn(3, 1, 12, 14) * 2, (torch.rand(3, 1, 12, 14) < 0.3).float()
    return logits, masks * 0 if empty else masks


def numbers(logits: torch.Tensor, masks: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return 1 / (1 + np.exp(-logits.double().numpy())), masks.double().numpy()


def lovasz_softmax(shares: np.ndarray, masks: np.ndarray) -> float:
    """The same on probabilities: the mean over unit and background, as far as an image has them."""
    values = []
    for share, mask in zip(shares.reshape(len(shares), -1), masks.reshape(len(masks), -1), strict=True):
        present = [(mask == label, share if label else 1 - share) for label in (0, 1) if (mask == label).any()]
        values.append(np.mean([_extension(np.abs(inside - own), inside) for inside, own in present]))
    return float(np.mean(values))


def _extension(errors: np.ndarray, inside: np.ndarray) -> float:
    total, before, wrong = 0.0, 0.0, np.zeros(len(inside), bool)
    for index in np.argsort(-errors, kind="stable"):
        wrong[index] = True
        now = 1 - (inside & ~wrong).sum() / (inside | wrong).sum()
        total, before = total + errors[index] * (now - before), now
    return total


def lovasz_hinge(logits: np.ndarray, masks: np.ndarray) -> float:
    """The Lovasz extension of 1 - Jaccard by definition: errors in falling order, times what each adds to the set
    function.
    """
    values = []
    for logit, mask in zip(logits.reshape(len(logits), -1), masks.reshape(len(masks), -1), strict=True):
        values.append(_extension(np.maximum(1 - logit * (2 * mask - 1), 0), mask == 1))
    return float(np.mean(values))


def formula(name: str, logits: torch.Tensor, masks: torch.Tensor) -> float:
    p, t = numbers(logits, masks)
    tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
    sure = np.where(t == 1, p, 1 - p)
    return {
        "bce": lambda: -np.log(sure).mean(),
        "ce": lambda: -np.log(sure).mean(),
        "dice": lambda: 1 - 2 * tp / (p.sum() + t.sum()),
        "jaccard": lambda: 1 - tp / (tp + fp + fn),
        "tversky": lambda: 1 - tp / (tp + 0.3 * fp + 0.7 * fn),
        "focal": lambda: -((1 - sure) ** 2 * np.log(sure)).mean(),
        "lovasz": lambda: lovasz_hinge(logits.double().numpy(), t),
        "lovasz-softmax": lambda: lovasz_softmax(p, t),
    }[name]()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_is_its_formula(name: str) -> None:
    logits, masks = batch()
    found = build_loss(name)(logits, masks)
    assert found.shape == () and found.dtype == torch.float32
    assert float(found) == pytest.approx(formula(name, logits, masks), rel=1e-4)


def test_bce_is_torchs() -> None:
    logits, masks = batch(1)
    torch.testing.assert_close(build_loss("bce")(logits, masks), F.binary_cross_entropy_with_logits(logits, masks))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("bce+dice", {"bce": 1, "dice": 1}),
        ("0.25*bce+0.75*lovasz", {"bce": 0.25, "lovasz": 0.75}),
        (" 2 * BCE + dice ", {"bce": 2, "dice": 1}),
        ("1e-2*focal+bce", {"focal": 0.01, "bce": 1}),
        ("bce+bce", {"bce": 2}),
        ("bce+tversky+focal+jaccard", {"bce": 1, "tversky": 1, "focal": 1, "jaccard": 1}),
    ],
)
def test_sums_are_weighted(text: str, weights: dict[str, float]) -> None:
    logits, masks = batch(2)
    expected = sum(weight * formula(name, logits, masks) for name, weight in weights.items())
    assert float(build_loss(text)(logits, masks)) == pytest.approx(expected, rel=1e-4)


def test_the_default_of_the_config_builds() -> None:
    build_loss(TrainingConfig().loss)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_perfect_is_near_zero_and_better_than_wrong(name: str) -> None:
    _, masks = batch()
    loss = build_loss(name)
    right, wrong = loss((masks * 2 - 1) * 30, masks), loss((1 - masks * 2) * 30, masks)
    assert 0 <= float(right) < 1e-3 and float(wrong) > 0.5


@pytest.mark.parametrize("text", [*sorted(LOSSES), "bce+dice"])
def test_gradients_are_finite_and_point_downhill(text: str) -> None:
    logits, masks = batch(3)
    logits.requires_grad_(True)
    loss = build_loss(text)
    before = loss(logits, masks)
    before.backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    with torch.no_grad():
        after = loss(logits - 0.01 * logits.grad / logits.grad.abs().max(), masks)
    assert after < before


@pytest.mark.parametrize(
    "text", ["bce+dice", "bce", "focal", "bce+tversky", "focal+jaccard", "lovasz", "bce+3*lovasz-softmax"]
)
def test_a_batch_without_foreground_still_teaches(text: str) -> None:
    logits, masks = batch(4, empty=True)
    logits.requires_grad_(True)
    loss = build_loss(text)(logits, masks)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad >= 0).all() and (logits.grad > 0).any(), "every logit should be pushed down"


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("full", [False, True])
def test_half_precision_logits_of_a_large_batch_do_not_overflow(name: str, full: bool) -> None:
    """A sum over 2 x 400 x 400 pixels passes 65504, the largest fp16 number."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 1, 400, 400) * 10).half().requires_grad_(True)
    masks = torch.ones(2, 1, 400, 400) if full else (torch.rand(2, 1, 400, 400) < 0.5).float()
    found = build_loss(name)(logits, masks)
    found.backward()
    assert found.dtype == torch.float32 and found.isfinite() and logits.grad.isfinite().all()
    torch.testing.assert_close(found, build_loss(name)(logits.detach().float(), masks))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_very_sure_logits_stay_finite(name: str, logit: float) -> None:
    logits, masks = torch.full((1, 1, 4, 4), logit, requires_grad=True), torch.eye(4)[None, None]
    found = build_loss(name)(logits, masks)
    found.backward()
    assert found.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("text", ["", "bcee", "bce+", "+dice", "bce,dice", "bce dice+", "dice-bce", "0.5bce", "mcc"])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="training.loss.*known are"):
        build_loss(text)


@pytest.mark.parametrize("weight", ["0", "-1", "x", "", "dice", "nan", "inf", "-inf", "1e400"])
def test_weights_that_are_no_positive_numbers_are_refused(weight: str) -> None:
    with pytest.raises(ConfigError, match="no positive weight"):
        build_loss(f"{weight}*bce+dice")


def test_a_loss_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The help, the sentence about unknown names and the builder follow from the one table."""
    listed = (TrainingConfig.model_fields["loss"].description or "").partition(";")[0]
    assert listed.split(", ") == list(LOSSES)
    monkeypatch.setitem(LOSSES, "soft-f1", ("segmentation_models_pytorch.losses:DiceLoss", {"from_logits": True}))
    logits, masks = batch()
    assert float(build_loss("2*soft-f1")(logits, masks)) == pytest.approx(2 * formula("dice", logits, masks), rel=1e-4)
    with pytest.raises(ConfigError, match=r"known are bce.*, soft-f1, joined"):
        build_loss("soft-f2")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_the_five_organs(name: str) -> None:
    logits, _ = batch()
    labels = torch.randint(6, (3, 1, 12, 14)).float()
    assert build_loss(name, "organs")(torch.cat([logits] * 6, dim=1), labels).isfinite()
