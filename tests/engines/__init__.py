"""Tests of the engine layer and of the workers behind it."""
