"""Isaac Lab behind a worker process. All but ``config`` and ``env`` runs in Isaac Lab's Python."""
