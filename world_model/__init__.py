"""The video world model, its success model, and imagination as an Env."""
