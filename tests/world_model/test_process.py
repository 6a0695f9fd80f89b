import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from hypothesis import given
from hypothesis import strategies as st

from world_model.model import Prediction
from world_model.pipeline import WorldModelPipeline, one_step
from world_model.process import Edm, Flow

PROCESSES = [Edm(), Flow(), Edm(sigma_data=0.3, sigma_max=5.0)]


@given(sigma=st.floats(1e-3, 80), sigma_data=st.floats(0.1, 2))
def test_edm_is_karras_table_1(sigma, sigma_data):
    scales = Edm(sigma_data=sigma_data).scales(torch.tensor([sigma], dtype=torch.float64))
    c_skip, c_out, c_in, c_noise = (float(value) for value in scales)
    assert c_skip == pytest.approx(sigma_data**2 / (sigma**2 + sigma_data**2))
    assert c_out == pytest.approx(sigma * sigma_data / (sigma_data**2 + sigma**2) ** 0.5)
    assert c_in == pytest.approx(1 / (sigma**2 + sigma_data**2) ** 0.5)
    assert c_noise == pytest.approx(np.log(sigma) / 4)


def test_edm_is_the_schedulers():
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    sigma, sample, output = torch.tensor(1.7), torch.randn(2, 3), torch.randn(2, 3)
    c_skip, c_out, c_in, c_noise = Edm().scales(sigma[None])
    assert torch.allclose(scheduler.precondition_inputs(sample, sigma), c_in * sample)
    assert torch.allclose(scheduler.precondition_noise(sigma), c_noise)
    assert torch.allclose(scheduler.precondition_outputs(sample, output, sigma), c_skip * sample + c_out * output)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.0])
def test_input_and_target_of_the_network_have_unit_deviation(process, share):
    generator = torch.Generator().manual_seed(0)
    frame = process.sigma_data * torch.randn(200_000, generator=generator)
    noise = torch.randn(200_000, generator=generator)
    sigma = share * process.start(1)
    noisy, scales = process.mix(frame, noise, sigma), process.scales(sigma)
    target = (frame - scales.skip * noisy) / scales.out
    assert (scales.in_ * noisy).std().item() == pytest.approx(1, abs=0.01)
    assert target.std().item() == pytest.approx(1, abs=0.01)
    # the best skip leaves nothing of the noisy frame in the target (EDM, appendix B.6)
    assert (target * noisy).mean().item() == pytest.approx(0, abs=0.01 * noisy.std().item())
    assert process.weight(sigma).item() == pytest.approx(1 / scales.out.item() ** 2, rel=1e-5)


@given(st.floats(-6, 6))
def test_levels_lie_between_none_and_the_start(normal):
    for process in PROCESSES:
        level = process.levels(torch.tensor([normal])).item()
        assert level > 0
    assert 0 < Flow().levels(torch.tensor([normal])).item() <= 1


class Oracle(torch.nn.Module):
    """Knows the frame."""

    def __init__(self, frame):
        super().__init__()
        self.frame = frame
        self.asked = 0

    def forward(self, noisy, scales, *given):
        self.asked += 1
        return Prediction(frames=self.frame, proprio=torch.zeros(len(noisy), 1, 1), error=torch.zeros(len(noisy), 1))


@pytest.mark.parametrize("process", PROCESSES[:2])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_perfect_denoiser_is_sampled_exactly(process, steps):
    frame = torch.rand(2, 1, 3, 8, 8) * 2 - 1
    oracle = Oracle(frame)
    pipeline = WorldModelPipeline.__new__(WorldModelPipeline)
    pipeline.denoiser, pipeline.scheduler = oracle, process.scheduler()
    pipeline._internal_dict = {"objective": "flow" if isinstance(process, Flow) else "edm", "offset_noise": 0.0}
    found = pipeline._sample(torch.randn(2, 1, 3, 8, 8), steps).frames
    assert oracle.asked == steps
    assert torch.allclose(found, frame, atol=0.02)  # EDM ends at sigma_min, not at 0
    assert torch.equal(one_step(oracle, process, torch.randn(2, 1, 3, 8, 8), torch.zeros(2)).frames, frame)


def test_flow_keeps_nothing_of_the_frame_at_its_start():
    frame, noise = torch.rand(4, 3), torch.randn(4, 3)
    assert torch.equal(Flow().mix(frame, noise, Flow().start(4)[:, None]), noise)
    scales = Flow().scales(Flow().start(1))
    assert (scales.skip.item(), scales.out.item(), scales.in_.item()) == (0, pytest.approx(0.5), 1)
