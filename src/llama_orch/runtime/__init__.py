"""Performs the core's effects: owns every asyncio task, the workers and the streams."""
