"""Executes programs: chunk parameters, the engine, optimizer state and where it lives. Never sees the solver."""
