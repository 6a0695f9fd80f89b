"""Isaac Lab behind a worker process. ``simulator``, ``launch``, ``assets`` and ``push`` run in Isaac Lab's Python."""
