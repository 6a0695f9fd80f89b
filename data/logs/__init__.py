"""Robot logs of every common format, as episodes of time-stamped streams."""
