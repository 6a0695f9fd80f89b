"""Keeps libraries from printing over our own progress: Lightning's banners and tips, diffusers' bars and warnings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and the libraries' loggers below errors, inside the block only."""
    names = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    verbosity, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        diffusers_logging.set_verbosity(verbosity)
        if bars:
            diffusers_logging.enable_progress_bar()
