import pytest
import torch
from diffusers import EDMEulerScheduler

from world_model.frames import to_bytes, to_pixels
from world_model.model import ActionUNet
from world_model.pipeline import WorldModelPipeline, start_noise
from world_model.process import Edm, Flow
from world_model.quiet import quiet

SCALES = Edm().scales(torch.full((3,), 2.0))


def tiny(cameras=1, action_dim=2, proprio_dim=3):
    torch.manual_seed(0)
    return ActionUNet(
        cameras=cameras, image_size=16, action_dim=action_dim, proprio_dim=proprio_dim, widths=(8, 16),
        proprio_mean=[0.0] * proprio_dim, proprio_std=[1.0] * proprio_dim,
    )


def inputs(model, rows=3):
    g = torch.Generator().manual_seed(1)
    config = model.config
    frames = torch.randint(0, 256, (rows, 4, 3 * config.cameras, 16, 16), generator=g, dtype=torch.uint8)
    actions = torch.rand(rows, 4, config.action_dim, generator=g) * 2 - 1
    return frames, actions, torch.rand(rows, 4, config.proprio_dim, generator=g), ["push the red button"] * rows


def test_the_model_is_preconditioned():
    model = tiny().eval()
    noisy, sigma = torch.randn(2, 1, 3, 16, 16), torch.tensor([0.3, 5.0])
    seen = {}
    model.unet.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0], output=output[0]))
    context, other = torch.zeros(2, 4, 3, 16, 16), torch.zeros(2, 4, 2)
    tokens, level = torch.ones(2, 24, dtype=torch.long), torch.zeros(2)
    with torch.no_grad():
        frame = model(noisy, Edm().scales(sigma), context, other, torch.zeros(2, 4, 3), tokens, level).frames[:, 0]
    noisy = noisy[:, 0]
    s = sigma[:, None, None, None]
    fed = torch.nn.functional.pixel_shuffle(seen["inputs"], 2)[:, :3]
    assert torch.allclose(fed, noisy / (s**2 + 0.25).sqrt(), atol=1e-5)
    painted = torch.nn.functional.pixel_shuffle(seen["output"], 2)
    assert torch.allclose(frame, 0.25 / (s**2 + 0.25) * noisy + s * 0.5 / (s**2 + 0.25).sqrt() * painted, atol=1e-5)


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("action_dim", [2, 26])
def test_gradients_reach_every_parameter(cameras, action_dim):
    model = tiny(cameras, action_dim)
    frames, actions, proprio, _ = inputs(model)
    tokens = torch.tensor([[3, 5] + [0] * 22] * 3)
    pixels = to_pixels(frames)
    prediction = model(pixels[:, -1:], SCALES, pixels, actions, proprio, tokens, torch.zeros(3))
    assert prediction.frames.shape == (3, 1, 3 * cameras, 16, 16)
    assert prediction.proprio.shape == (3, 1, 3)
    assert prediction.error.shape == (3, 1)
    torch.nn.init.normal_(model.proprio_head[-1].weight)
    prediction = model(pixels[:, -1:], SCALES, pixels, actions, proprio, tokens, torch.zeros(3))
    (prediction.frames.square().mean() + prediction.proprio.square().mean() + prediction.error.mean()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_the_error_head_sends_no_gradient_to_the_rest():
    model = tiny()
    frames, actions, proprio, _ = inputs(model)
    pixels = to_pixels(frames)
    tokens = torch.ones(3, 24, dtype=torch.long)
    error = model(pixels[:, -1:], SCALES, pixels, actions, proprio, tokens, torch.zeros(3)).error
    error.sum().backward()
    touched = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert touched == {"error_head"}


@pytest.mark.parametrize("objective", ["edm", "flow", "regression"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_saved_pipeline_predicts_the_same_bits(tmp_path, objective, steps):
    with quiet():
        scheduler = (Flow() if objective == "flow" else Edm()).scheduler()
        pipeline = WorldModelPipeline(
            denoiser=tiny().eval(), scheduler=scheduler, objective=objective, offset_noise=0.1)
        pipeline.save_pretrained(tmp_path)
        again = WorldModelPipeline.from_pretrained(tmp_path)
    assert again.config.objective == objective
    assert again.process == (Flow() if objective == "flow" else Edm())
    given = inputs(pipeline.denoiser)
    first = pipeline(*given, torch.Generator().manual_seed(5), num_inference_steps=steps)
    second = again(*given, torch.Generator().manual_seed(5), num_inference_steps=steps)
    for name in ("frames", "proprio", "error"):
        assert torch.equal(first[name], second[name])


def test_each_row_has_its_own_noise():
    pipeline = WorldModelPipeline(denoiser=tiny().eval(), scheduler=EDMEulerScheduler(sigma_max=2.0))
    given = inputs(pipeline.denoiser)
    both = pipeline(*given, [torch.Generator().manual_seed(i) for i in (7, 8, 9)]).frames
    swapped = pipeline(*given, [torch.Generator().manual_seed(i) for i in (7, 1, 9)]).frames
    assert torch.equal(both[0], swapped[0])
    assert not torch.equal(both[1], swapped[1])
    with pytest.raises(ValueError, match="one per row"):
        pipeline(*given, [torch.Generator()])


def test_bytes_survive_the_round_trip_to_pixels():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_pixels(values)), values)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_offset_noise_moves_a_channel_as_a_whole():
    plain, moved = (start_noise(torch.Size((2, 3, 16, 16)), torch.Generator().manual_seed(3), offset)
                    for offset in (0.0, 0.5))
    difference = moved - plain
    assert torch.allclose(difference, difference.mean((2, 3), keepdim=True).expand_as(difference), atol=1e-6)
    assert difference.std() > 0.1
