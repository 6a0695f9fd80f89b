"""Settings of ``runtime=ray``. Imports no Ray: a command line that does not use it needs none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.fabric import Fabric

from data.types import UserError

if TYPE_CHECKING:
    from wm_rl.loop import Loop


@dataclass(frozen=True, kw_only=True)
class RayRuntime:
    """How the last stage is spread; the stages before it run in the driver, as ``runtime=local`` runs them."""

    fabric: Callable[..., Fabric]
    """``wm_rl.fabric.make_fabric`` but for the number of processes: device and precision of the driver's own stages and
    of the learner, and how the learner's ranks share the policy."""
    address: str | None
    """Cluster to join (``host:port``, or ``auto``); null starts one on this machine, which listens to 127.0.0.1 only
    and ends with the driver."""
    object_store_bytes: int
    """Shared memory of a cluster that is started here."""
    collectors: int
    """Processes that simulate, each with ``env.num_envs`` rows."""
    rows_per_thread: int
    """Rows that are stepped together, and ask the inference server together: fewer requests, which pays where a
    simulator's step takes a few milliseconds. 1: no row waits for another."""
    inference_servers: int
    imaginers: int
    learners: int
    """Processes that share every update."""
    learner_nodes: int
    """Machines that these are dealt to, as far as the cluster has so many; the first is the driver's. On the others a
    copy of the store is kept."""
    copies: str | None
    """Folder for such a copy, on a disk of that machine; null: with its temporary files. It goes when the run ends."""
    batch_size: int
    """Rows at which an inference server stops waiting for more."""
    max_age_ms: float
    """Longest that a request waits for others to share its forward pass, once the server is free."""
    publish_every: int
    """Updates between two publications of the weights."""
    max_lag: float
    """Mean lag of what arrives, in updates, above which collectors play fewer rows at a time (never less than one)."""
    updates_per_episode: float | None
    """Most updates per collected episode; collectors wait while they are an iteration ahead of it. Null keeps the ratio
    of ``runtime=local``, ``.inf`` lets each side run as fast as it can."""
    patience: float
    """Seconds that a step of a simulator may take before its collector is killed and replaced; anybody else's call may
    take ten times as long."""
    max_restarts: int
    """Deaths of one actor within an hour after which the run stops."""

    @property
    def gpus(self) -> int:
        """That Ray must give to each rank of the learner: it hides them from whoever asks for none."""
        return int(getattr(self.fabric, "keywords", {}).get("accelerator") in ("cuda", "gpu"))

    def __call__(self) -> Fabric:
        """For the stages, and the commands, that run in one process."""
        return self.fabric(strategy="auto")

    def improve(self, loop: Loop) -> None:
        """Run the last stage of ``loop`` spread over actors."""
        from wm_rl.cluster.driver import improve_on_cluster  # late: needs Ray

        improve_on_cluster(loop, self)

    def __post_init__(self) -> None:
        """Refuse counts that make no run, and a machine without Ray."""
        for name in ("collectors", "rows_per_thread", "inference_servers", "imaginers", "learners", "learner_nodes",
                     "batch_size", "publish_every", "max_restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"runtime.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("object_store_bytes", "max_lag", "updates_per_episode", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"runtime.{name} must be positive, got {value}")
        if not self.max_age_ms >= 0:
            raise UserError(f"runtime.max_age_ms must not be negative, got {self.max_age_ms}")
        if self.learner_nodes > self.learners:
            raise UserError(f"runtime.learner_nodes: expected at most as many as runtime.learners={self.learners}, got "
                            f"{self.learner_nodes}; type runtime.learners={self.learner_nodes}")
        if self.learners == 1 and getattr(self.fabric, "keywords", {}).get("strategy") == "fsdp":
            raise UserError("runtime.fabric.strategy=fsdp: expected at least 2 learners to shard over, got "
                            "runtime.learners=1; type runtime.learners=2")
        if importlib.util.find_spec("ray") is None:
            raise UserError("runtime=ray: expected the package ray, which is not installed; type: "
                            "pip install 'wm-rl[ray]'")
