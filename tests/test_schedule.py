"""The flow-matching schedule, against its formulas in plain floats."""

import math

import pytest
import torch
from toy import randn

from model.schedule import FlowMatchSchedule


def sigma_of(u, shift):
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_table(shift):
    schedule = FlowMatchSchedule(shift)
    expected = [sigma_of(1 - i / 1000, shift) for i in range(1000)]
    torch.testing.assert_close(schedule.sigmas, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.timesteps, 1000 * torch.tensor(expected), atol=1e-3, rtol=0)


def test_warped_steps():
    assert FlowMatchSchedule(5.0).warp([1000, 750, 500, 250]).tolist() == pytest.approx(
        [1000, 937.5, 833.3333, 625], abs=1e-3
    )
    assert FlowMatchSchedule(1.0).warp([1000, 250.0]).tolist() == pytest.approx([1000, 250], abs=1e-3)
    for bad in ([0], [1001], [1000, -5]):
        with pytest.raises(ValueError, match=r"sampling steps .* must lie in \(0, 1000\]"):
            FlowMatchSchedule(5.0).warp(bad)


def test_timesteps_snap_to_the_nearest_entry():
    schedule = FlowMatchSchedule(5.0)
    for t in (0.0, 3.0, 500.0, 832.9, 937.5, 1000.0):
        nearest = min(range(1000), key=lambda i: abs(float(schedule.timesteps[i]) - t))
        assert schedule.index(torch.tensor([t])).item() == nearest
        assert schedule.sigma(torch.tensor([t])).item() == float(schedule.sigmas[nearest])
    assert schedule.index(torch.full((2, 3), 500.0)).shape == (2, 3)


def test_noising_and_its_inverses():
    schedule = FlowMatchSchedule(5.0)
    x0, noise = randn(2, 4, 3, 2, 2, seed=1), randn(2, 4, 3, 2, 2, seed=2)
    t = torch.tensor([937.5, 250.0])
    x_t = schedule.add_noise(x0, noise, t)
    for sample in range(2):
        sigma = float(schedule.sigma(t)[sample])
        assert sigma == pytest.approx(float(t[sample]) / 1000, abs=5e-3)  # snapped
        torch.testing.assert_close(x_t[sample], (1 - sigma) * x0[sample] + sigma * noise[sample], atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.flow_to_x0(noise - x0, x_t, t), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(schedule.x0_to_flow(x0, x_t, t), noise - x0, atol=1e-5, rtol=0)


def test_one_timestep_per_frame():
    schedule = FlowMatchSchedule(5.0)
    x0, noise = randn(2, 4, 3, 2, 2, seed=1), randn(2, 4, 3, 2, 2, seed=2)
    t = torch.tensor([[1000.0, 500.0, 20.0], [700.0, 700.0, 3.0]])
    x_t = schedule.add_noise(x0, noise, t)
    for frame in range(3):
        part = slice(frame, frame + 1)
        alone = schedule.add_noise(x0[:, :, part], noise[:, :, part], t[:, frame])
        assert torch.equal(x_t[:, :, part], alone)
    torch.testing.assert_close(schedule.flow_to_x0(noise - x0, x_t, t), x0, atol=1e-5, rtol=0)


def test_training_weight_is_a_bell_of_mean_one():
    schedule = FlowMatchSchedule(5.0)
    bell = [math.exp(-2 * ((float(t) - 500) / 1000) ** 2) for t in schedule.timesteps]
    lowest = min(bell)
    mean = sum(value - lowest for value in bell) / 1000
    expected = torch.tensor([(value - lowest) / mean for value in bell])
    torch.testing.assert_close(schedule.training_weights, expected, atol=1e-4, rtol=0)
    assert schedule.training_weights.mean().item() == pytest.approx(1, abs=1e-5)
    t = torch.tensor([[500.0, 1000.0]])
    assert schedule.training_weight(t).shape == (1, 2)
    assert schedule.training_weight(t)[0, 0] == schedule.training_weights.max() > schedule.training_weight(t)[0, 1]


def test_euler_sigmas_run_from_noise_to_clean():
    sigmas = FlowMatchSchedule(3.0).euler_sigmas(4).tolist()
    assert sigmas == pytest.approx([sigma_of(u, 3.0) for u in (1, 0.75, 0.5, 0.25, 0)], abs=1e-6)
    assert sigmas[0] == 1 and sigmas[-1] == 0


def test_bfloat16_latents_stay_so():
    schedule, t = FlowMatchSchedule(5.0), torch.tensor([500.0])
    x = randn(1, 4, 1, 2, 2, seed=1).bfloat16()
    assert {f(x, x, t).dtype for f in (schedule.add_noise, schedule.flow_to_x0, schedule.x0_to_flow)} == {
        torch.bfloat16
    }


def test_shift_must_be_positive():
    with pytest.raises(ValueError, match="schedule shift is 0"):
        FlowMatchSchedule(0)
