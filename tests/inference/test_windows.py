"""Windows: an identity predictor gives the slide back, MONAI's sliding window agrees, and windows can be left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hubmap_kit.inference.windows import Predictor, plan, plan_axis, sample, stitch, whole_plane


def first_channel(windows: torch.Tensor) -> torch.Tensor:
    return windows[:, 0] / 255


def plane_of(image: np.ndarray, predict: Predictor, *how: object, **more: object) -> np.ndarray:
    plane = stitch(torch.from_numpy(image), predict, *how, **more)
    assert plane.dtype == torch.float32
    return plane.numpy()


def local_network(seed: int) -> nn.Module:
    """A fixed network that sees 5 pixels to each side and no further."""
    torch.manual_seed(seed)
    first, second, last = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 1, 3, padding=1)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last, nn.Sigmoid()).eval()


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def predictor(network: nn.Module) -> Predictor:
    return lambda windows: network(windows / 255)[:, 0]


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(length=st.integers(1, 700), size=st.integers(1, 200), overlap=st.floats(0, 0.95))
@settings(deadline=None, max_examples=200)
def test_plan(length: int, size: int, overlap: float) -> None:
    length = max(length, size)
    axis = plan_axis(length, size, overlap)
    assert axis.starts[0] == 0 and axis.starts[-1] == length - size
    assert axis.weights.shape == (len(axis.starts), size) and (axis.weights > 0).all()
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        total[start : start + size] += weights
    np.testing.assert_allclose(total, 1, atol=1e-5)
    steps = np.diff(axis.starts)
    assert (steps > 0).all() and (steps <= max(1, size * (1 - overlap) + 1e-6)).all(), (
        "neighbours share less than asked"
    )
    # Even spacing: no pair of windows shares much more than another.
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


@given(length=st.integers(1, 700), size=st.integers(1, 200), overlap=st.floats(0, 0.8))
@settings(deadline=None, max_examples=200)
def test_no_window_too_many(length: int, size: int, overlap: float) -> None:
    length = max(length, size)
    count = len(plan_axis(length, size, overlap).starts)
    step = max(1, int(np.floor(size * (1 - overlap))))
    assert count == 1 or (count - 2) * step + size < length


def test_the_documented_example() -> None:
    assert plan_axis(110, 64, 0.5).starts.tolist() == [0, 23, 46]


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(63, 64, 0.0), (64, 64, 1.0), (64, 64, -0.1), (64, 64, float("nan"))]
)
def test_nonsense_is_refused(length: int, size: int, overlap: float) -> None:
    with pytest.raises(ValueError, match="need size <= length"):
        plan_axis(length, size, overlap)


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.sampled_from([64, 96, 128]),
    overlap=st.floats(0, 0.8),
    batch=st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_an_identity_predictor_gives_the_slide_back(
    height: int, width: int, size: int, overlap: float, batch: int
) -> None:
    image = random_image(height, width)
    shapes = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(windows.shape))
        assert windows.dtype == torch.uint8
        return first_channel(windows)

    plane = plane_of(image, predict, size, overlap, batch)
    assert plane.shape == (height, width)
    np.testing.assert_allclose(plane, image[..., 0] / 255, atol=1e-5)
    assert plane.min() >= 0 and plane.max() <= 1
    # Full batches, but for the last.
    assert {shape[1:] for shape in shapes} == {(3, size, size)}
    assert {shape[0] for shape in shapes[:-1]} <= {batch} and 1 <= shapes[-1][0] <= batch


def test_windows_of_a_small_slide_are_its_mirror_image() -> None:
    image, seen = random_image(40, 70), []
    plane_of(image, lambda windows: seen.append(windows.numpy().copy()) or first_channel(windows), 64, 0.0, 8)
    assert len(np.concatenate(seen)) == 2
    whole = np.pad(image, [(0, 24), (0, 0), (0, 0)], mode="symmetric").transpose(2, 0, 1)
    np.testing.assert_array_equal(np.concatenate(seen), np.stack([whole[..., :64], whole[..., 6:]]))


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(("height", "width", "overlap"), [(150, 203, 0.5), (131, 97, 0.25)])
def test_monai_agrees_where_no_window_edge_matters(mode: str, height: int, width: int, overlap: float) -> None:
    """Away from every window's border a local network does not know where its window lies, so any weighting gives the
    same.
    """
    inferers = pytest.importorskip("monai.inferers.utils")
    image, network, size, reach = random_image(height, width, 1), local_network(2), 64, 5
    mine = plane_of(image, predictor(network), size, overlap, 4)
    with torch.inference_mode():
        inputs = as_tensor(image[None])
        theirs = inferers.sliding_window_inference(inputs, size, 4, network, overlap=overlap, mode=mode)[0, 0].numpy()
        whole = network(inputs)[0, 0].numpy()
    clear = np.ones((height, width), bool)
    step = int(size * (1 - overlap))
    for axis, length in enumerate((height, width)):
        monai_starts = [min(number * step, length - size) for number in range(-(-(length - size) // step) + 1)]
        for start in (*plan_axis(length, size, overlap).starts, *monai_starts):
            for edge in (start, start + size):
                band = slice(max(0, edge - reach), edge + reach)
                clear[band if axis == 0 else slice(None), band if axis == 1 else slice(None)] = False
    assert clear.mean() > 0.15
    np.testing.assert_allclose(mine[clear], theirs[clear], atol=1e-5)
    np.testing.assert_allclose(mine[clear], whole[clear], atol=1e-5)
    # Elsewhere zero padding at window borders shows; a blend must stay near all the same.
    assert np.abs(mine - whole).mean() < 0.02


def test_a_seam_is_blended_and_not_cut() -> None:
    """Two windows that disagree: the plane passes from one to the other without a jump."""
    values = iter([0.0, 1.0])
    plane = plane_of(random_image(64, 96), lambda windows: torch.full(windows[:, 0].shape, next(values)), 64, 0.5, 1)
    assert (plane[:, :32] == 0).all() and np.allclose(plane[:, 64:], 1, atol=1e-6)
    assert (np.diff(plane[0, 31:65]) > 0).all() and np.diff(plane[0]).max() < 0.2
    np.testing.assert_allclose(plane[0], 1 - plane[0, ::-1], atol=1e-6)


def test_the_mean_of_two_networks_inside_the_window_is_the_mean_of_two_runs() -> None:
    image, one, two = random_image(100, 140, 3), predictor(local_network(4)), predictor(local_network(5))
    both = plane_of(image, lambda windows: (one(windows) + two(windows)) / 2, 64, 0.25, 3)
    apart = [plane_of(image, predict, 64, 0.25, 3) for predict in (one, two)]
    np.testing.assert_allclose(both, (apart[0] + apart[1]) / 2, atol=1e-6)


def test_the_batch_size_changes_nothing() -> None:
    image, predict = random_image(100, 140, 3), predictor(local_network(4))
    planes = [plane_of(image, predict, 64, 0.3, batch) for batch in (1, 2, 7, 100)]
    for plane in planes[1:]:
        np.testing.assert_allclose(plane, planes[0], atol=1e-6)


@given(seed=st.integers(0, 99), height=st.integers(64, 180), width=st.integers(64, 180), batch=st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_windows_that_are_left_out_add_nothing(seed: int, height: int, width: int, batch: int) -> None:
    image, (rows, cols), seen = random_image(height, width, seed), plan(height, width, 64, 0.25), []
    keep = np.random.default_rng(seed).random((len(rows.starts), len(cols.starts))) < 0.5
    plane = plane_of(
        image, lambda windows: seen.append(len(windows)) or first_channel(windows), 64, 0.25, batch, keep=keep
    )
    expected = np.zeros((height, width))
    for row, col in np.argwhere(keep):
        place = (slice(rows.starts[row], rows.starts[row] + 64), slice(cols.starts[col], cols.starts[col] + 64))
        expected[place] += image[..., 0][place] / 255 * np.outer(rows.weights[row], cols.weights[col])
    np.testing.assert_allclose(plane, expected, atol=1e-5)
    assert sum(seen) == keep.sum()


@given(height=st.integers(1, 150), width=st.integers(1, 150))
@settings(deadline=None, max_examples=30)
def test_a_slide_in_one_piece(height: int, width: int) -> None:
    image, shapes = random_image(height, width), []
    plane = whole_plane(
        torch.from_numpy(image), lambda windows: shapes.append(tuple(windows.shape)) or first_channel(windows)
    )
    np.testing.assert_allclose(plane.numpy(), image[..., 0] / 255, atol=1e-6)
    ((count, channels, tall, wide),) = shapes
    assert (
        (count, channels) == (1, 3)
        and tall % 32 == wide % 32 == 0
        and 0 <= tall - height < 32
        and 0 <= wide - width < 32
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (101, 200), (40, 90), (7, 7)])
def test_a_sample_is_a_window_of_the_middle(height: int, width: int) -> None:
    image = random_image(height, width)
    window = sample(torch.from_numpy(image), 64).numpy()
    whole = np.pad(image, [(0, max(0, 64 - height)), (0, max(0, 64 - width)), (0, 0)], mode="symmetric")
    top, left = ((length - 64) // 2 for length in whole.shape[:2])
    np.testing.assert_array_equal(window, whole[None, top : top + 64, left : left + 64])
