"""Lightning's Fabric for a runtime: devices, precision, and what the processes of one update share.

``ddp`` copies the policy to every process; ``fsdp`` shards weights, gradients and the optimiser's state over all of
them (FSDP2, torch's ``fully_shard``: unlike its predecessor it also runs on CPUs, so the tests see the same code).
"""

from __future__ import annotations

import os
import shutil
import warnings
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data.types import UserError
from wm_rl.policy import TokenPolicy

STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS = ("32-true", "bf16-mixed")


def make_fabric(
    *, accelerator: str, precision: str, strategy: str = "auto", devices: int = 1, num_nodes: int = 1
) -> Fabric:
    """One process per device.

    Args:
        accelerator: ``cpu``, ``cuda``, or another of Lightning's names.
        devices: processes on each machine.
        num_nodes: machines.
        precision: ``32-true``, or ``bf16-mixed`` (weights, statistics and losses stay in fp32).
        strategy: ``auto`` is one process, or ``ddp`` where there are several.

    Raises:
        UserError: what this machine has not, or what does not go together.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"runtime.strategy: expected {', '.join(STRATEGIES)}, got {strategy!r}")
    if precision not in PRECISIONS:
        raise UserError(f"runtime.precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    if devices < 1:
        raise UserError(f"runtime.devices must be at least 1, got {devices}")
    if accelerator in ("cuda", "gpu") and torch.cuda.device_count() < devices:
        raise UserError(f"runtime: expected {devices} CUDA device(s), found {torch.cuda.device_count()}; ask for "
                        "fewer, or type runtime.accelerator=cpu")
    processes = devices * num_nodes
    if strategy == "fsdp" and processes < 2:
        raise UserError("runtime.strategy=fsdp: expected at least 2 devices to shard over, got 1; type "
                        "runtime.devices=2, or leave runtime.strategy out")
    chosen: Any = strategy
    if strategy == "fsdp":
        chosen = ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)
    return Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=chosen,
                  precision=precision)  # type: ignore[arg-type]


def prepare(fabric: Fabric, policy: TokenPolicy, *, checkpointing: bool, compiled: bool) -> Any:
    """What to call instead of ``policy``, whose parameters are trained in place.

    Raises:
        UserError: ``compiled`` on a CPU without a compiler.
    """
    if checkpointing:
        blocks = set(policy.blocks())
        apply_activation_checkpointing(policy, check_fn=lambda module: module in blocks)
    if not compiled:
        return fabric.setup_module(policy)
    if fabric.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("learner.compile=true: expected a C++ compiler (g++, clang++ or what CXX names), found none; "
                        "install one, or type learner.compile=false")
    return fabric.setup_module(torch.compile(policy))  # type: ignore[arg-type]


def reduce(fabric: Fabric, values: Tensor, how: str) -> Tensor:
    """``sum`` or ``max`` over the ranks, elementwise; every rank gets it."""
    reduced = fabric.all_reduce(values, reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced


def is_sharded(fabric: Fabric) -> bool:
    """No process has the whole policy."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def whole(state: Any) -> Any:
    """A state dict with every shard replaced by the whole tensor. Every rank calls it, with the same keys."""
    return apply_to_collection(state, DTensor, DTensor.full_tensor)


def load_sharded(policy: nn.Module, optimizer: Any, weights: dict[str, Any], moments: dict[str, Any]) -> None:
    """Inverse of ``whole`` for a sharded policy and the state of its optimiser. Every rank calls it."""
    own = policy.state_dict()
    policy.load_state_dict({name: _shard_like(value, own[name]) for name, value in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict({**moments, "state": {
        i: {name: _shard_like(value, parameters[i]) for name, value in values.items()}
        for i, values in moments["state"].items()}})


def _shard_like(value: Tensor, own: Tensor) -> Tensor:
    """The part of ``value`` that ``own`` is of its whole; a scalar, or what belongs to no shard, is kept."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def _shard(policy: Any, mesh: DeviceMesh) -> Any:
    """Gather one block at a time, forward and backward; what is outside the blocks stays whole in between."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of in-place operations on its output: none
    for parameter in policy.parameters():
        parameter.data = parameter.data.contiguous()  # it knows no other memory format
    for block in policy.blocks():
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(policy, mesh=mesh["data_parallel"])
    return policy
