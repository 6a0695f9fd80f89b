"""Policies, objectives, returns, the Fabric learner, and the commands that tie the packages together."""
