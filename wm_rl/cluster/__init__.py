"""The last stage of the loop spread over Ray actors: ``runtime=ray``."""
