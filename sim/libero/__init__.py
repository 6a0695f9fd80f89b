"""LIBERO's suites behind a worker process: ``env`` is our side, ``simulator`` what runs in LIBERO's own environment."""
