"""Simulators behind one Env contract, scripted experts, the robot stand-in, and evaluation."""
