"""Llama-Orch, Home Profile: one queue and one API in front of the engines of one workstation."""

__version__ = "0.1.0"
