"""Where the actors run: a cluster of this machine's own, or one to join."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.types import UserError
from wm_rl.cluster.config import RayRuntime

SWITCHES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_kill_child_processes_on_worker_exit": "1",
            "RAY_worker_register_timeout_seconds": "600", "RAY_agent_register_timeout_ms": "600000",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
"""Ray's own: nothing is reported to anyone; no child outlives its actor; a busy machine may take long to start a
process; Ray's agents look for a dead cluster for 20 s (by default for 60) before they end. On a busy machine
its head may well be silent for 5."""


@contextmanager
def cluster(runtime: RayRuntime, *, cpus: int) -> Iterator[dict[str, Any]]:
    """Ray, until the block ends; yields the options that keep an actor on this node, beside the store.

    A cluster that is started here has ``cpus`` logical CPUs and no dashboard. It ends with the driver, also when that
    is killed: Ray's reaper sees to it.

    Raises ``UserError`` when the cluster to join does not let us in.
    """
    if runtime.address is None:
        os.environ.update({name: os.environ.get(name, value) for name, value in SWITCHES.items()})
    import ray  # late: it reads these
    from ray._private import ray_constants
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Off, every port is on 127.0.0.1. Its variable is read when Ray is imported, and whoever calls this has done that.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, runtime.address is not None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if runtime.address is None:
            ray.init(address="local", num_cpus=cpus, object_store_memory=runtime.object_store_bytes,
                     include_dashboard=False, **quiet)
        else:
            try:
                ray.init(address=runtime.address, **quiet)
            except ConnectionError as error:  # Ray says the same when it is refused for its token
                raise UserError(
                    f"expected a Ray cluster at runtime.address={runtime.address}, got no connection: is it up? If it "
                    f"was started with a token, which Ray does wherever ~/.ray/auth_token exists, this machine needs "
                    f"the same one; type RAY_AUTH_MODE=token python main.py ...") from error
        here = ray.get_runtime_context().get_node_id()
        yield {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = before
