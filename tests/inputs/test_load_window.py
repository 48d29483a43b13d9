"""Steps of recordings are added up, and joined to a few of equal weight, so that long recordings take little memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eplb_core.inputs.load_window import MOST_STEPS, LoadWindow
from eplb_core.inputs.loads import LoadOptions, read_load_window, read_recording


def joined(steps: NDArray[np.float64], decay: float = 1.0, block: int = 7) -> LoadWindow:
    """Give the steps a few at a time, as a reader does."""
    window = LoadWindow(steps.shape[1:], len(steps), decay)
    for first in range(0, len(steps), block):
        window.add(steps[first : first + block])
    return window


def recorded(num_steps: int) -> NDArray[np.float64]:
    return np.random.default_rng(num_steps).integers(0, 1000, (num_steps, 2, 5)).astype(np.float64)


@pytest.mark.parametrize("num_steps", [1, 2, 8, MOST_STEPS])
def test_a_few_steps_stay_as_they_are(num_steps: int) -> None:
    steps = recorded(num_steps)
    window = joined(steps)
    assert window.steps.tolist() == steps.tolist()
    assert window.loads.tolist() == steps.sum(axis=0).tolist()


def test_steps_that_divide_evenly_are_joined_whole() -> None:
    steps = recorded(3 * MOST_STEPS)
    expected = [steps[first : first + 3].sum(axis=0).tolist() for first in range(0, len(steps), 3)]
    assert joined(steps).steps.tolist() == expected


@pytest.mark.parametrize("num_steps", [MOST_STEPS + 1, 100, 127, 1000, 4099])
@pytest.mark.parametrize("block", [1, 7, 5000])
def test_many_steps_are_joined_to_a_few_that_add_up_to_the_same_bit_by_bit(num_steps: int, block: int) -> None:
    steps = recorded(num_steps)
    window = joined(steps, block=block)
    assert MOST_STEPS / 2 <= len(window.steps) <= MOST_STEPS
    assert window.loads.tolist() == steps.sum(axis=0).tolist()
    assert window.steps.sum(axis=0).tolist() == window.loads.tolist()


@pytest.mark.parametrize(("num_steps", "decay"), [(100, 1.0), (4099, 1.0), (30, 0.9), (1000, 0.9), (5000, 0.999)])
def test_each_joined_step_has_the_same_weight(num_steps: int, decay: float) -> None:
    weights = joined(np.ones((num_steps, 1, 1)), decay).steps.ravel()
    assert weights == pytest.approx(weights.mean(), rel=2e-3)


@pytest.mark.parametrize(("num_steps", "decay"), [(1, 0.5), (3, 0.5), (30, 0.9), (5000, 0.999), (5000, 1e-9)])
def test_with_decay_the_joined_steps_add_up_to_the_decayed_loads(num_steps: int, decay: float) -> None:
    steps = recorded(num_steps)
    expected = np.zeros(steps.shape[1:])
    for step in steps:
        expected = expected * decay + step
    window = joined(steps, decay)
    np.testing.assert_allclose(window.loads, expected, rtol=1e-12)
    np.testing.assert_allclose(window.steps.sum(axis=0), expected, rtol=1e-9)


def test_the_mean_of_joined_steps_is_as_uncertain_as_that_of_the_steps() -> None:
    steps = np.random.default_rng(0).poisson(100, (6400, 1, 200)).astype(np.float64)
    window = joined(steps)
    of_steps = steps.var(axis=0, ddof=1).mean() * len(steps)
    of_joined = window.steps.var(axis=0, ddof=1).mean() * len(window.steps)
    assert of_joined == pytest.approx(of_steps, rel=0.1)


def test_slots_are_mapped_to_experts_in_every_step(tmp_path: Path) -> None:
    counts = recorded(3)
    np.save(tmp_path / "slots.npy", counts)
    placement = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, -1]])
    options = LoadOptions(counts="physical", placement=placement, window_steps=2)
    found = read_recording(tmp_path / "slots.npy", options)
    expected = np.zeros((2, 2, 4))
    for step, layer, slot in np.ndindex(2, 2, 5):
        if placement[layer, slot] >= 0:
            expected[step, layer, placement[layer, slot]] += counts[step + 1, layer, slot]
    assert found.window.tolist() == expected.tolist()
    assert found.loads.tolist() == expected.sum(axis=0).tolist()


def test_loads_without_steps_are_a_window_of_one(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", recorded(1)[0])
    assert read_recording(tmp_path / "loads.npy").window.tolist() == recorded(1).tolist()


def test_every_step_of_a_long_recording_is_there_for_who_needs_them_all(tmp_path: Path) -> None:
    steps = recorded(3 * MOST_STEPS)
    np.save(tmp_path / "steps.npy", steps)
    assert read_load_window(tmp_path / "steps.npy").tolist() == steps.tolist()
