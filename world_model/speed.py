"""How fast the model imagines, beside what the same core can do at best and beside the simulator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.types import Env
from world_model.pipeline import WorldModelPipeline

ROUNDS = 8
"""Alternating measurements; the median of them counts."""


def denoising_share(pipeline: WorldModelPipeline, *, rows: int) -> dict[str, float]:
    """FLOP/s of one call of the video model, over those of dense matrix products of its layers' shapes and precision.

    The products are those that its convolutions and linear layers amount to (``rows · pixels × inputs · kernel`` by
    ``inputs · kernel × outputs``), timed by turns with the model on the same device. What else it does (norms,
    activations, moving pixels) costs time and counts no FLOPs.
    """
    model, device = pipeline.denoiser, pipeline.device
    config, dtype = model.config, next(model.parameters()).dtype
    shape = rows, config["context"], 3 * config["cameras"], config["image_size"], config["image_size"]
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    actions = torch.zeros(rows, config["context"] - 1 + model.chunk, config["action_dim"])
    proprio = torch.zeros(rows, config["context"], config["proprio_dim"])
    generator = torch.Generator().manual_seed(0)

    def imagine() -> None:
        pipeline(frames, actions, proprio, [""] * rows, generator)

    shapes = _products(model, imagine)
    factors = [(torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device))
               for m, k, n in shapes]

    def multiply() -> None:
        for left, right in factors:
            torch.mm(left, right)

    with FlopCounterMode(display=False) as counter:
        imagine()
    flops, product_flops = float(counter.get_total_flops()), float(sum(2 * m * k * n for m, k, n in shapes))
    seconds, product_seconds = _by_turns(imagine, multiply, device)
    rate, ceiling = flops / seconds, product_flops / product_seconds
    return {"denoising_gflops": rate / 1e9, "product_gflops": ceiling / 1e9, "denoising_share": rate / ceiling,
            "flops_per_frame": flops / (rows * model.chunk)}


def imagination_against(imagination: Env, simulator: Env, *, steps: int) -> dict[str, float]:
    """Frames per second of both with random actions, timed by turns in this process; all rows act all the time."""
    rng = np.random.default_rng(0)
    seeds = iter(range(1, 1_000_000))

    def play(env: Env) -> int:
        parked = np.ones(env.num_envs, bool)
        for _ in range(steps):
            if parked.any():
                env.reset(seed=[next(seeds) for _ in parked], options={"reset_mask": parked})
            actions = rng.uniform(-1, 1, (env.num_envs, env.spec.action_dim)).astype(np.float32)
            _, _, terminated, truncated, _ = env.step(actions)
            parked = terminated | truncated
        return steps * env.num_envs

    rates: dict[str, list[float]] = {"imagined_fps": [], "simulated_fps": []}
    for env in (imagination, simulator):
        play(env)
    for _ in range(ROUNDS):
        for name, env in (("imagined_fps", imagination), ("simulated_fps", simulator)):
            begun = time.process_time()
            frames = play(env)
            rates[name].append(frames / (time.process_time() - begun))
    result = {name: float(np.median(values)) for name, values in rates.items()}
    return result | {"speed_ratio": result["imagined_fps"] / result["simulated_fps"]}


def _products(module: nn.Module, call: Callable[[], None]) -> list[tuple[int, int, int]]:
    """``(m, k, n)`` of the matrix product that each convolution and linear layer of ``module`` amounts to."""
    shapes: list[tuple[int, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            k = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
            shapes.append((output.numel() // layer.out_channels, k, layer.out_channels))
        elif isinstance(layer, nn.Linear):
            shapes.append((output.numel() // layer.out_features, layer.in_features, layer.out_features))

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()
    return shapes


def _by_turns(first: Callable[[], None], second: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Median seconds of each: CPU seconds on a CPU, so that a neighbour's load does not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: list[list[float]] = [[], []]
    for round_ in range(ROUNDS + 2):
        for i, work in enumerate((first, second)):
            begun = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 2:
                times[i].append(clock() - begun)
    return float(np.median(times[0])), float(np.median(times[1]))
