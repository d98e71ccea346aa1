"""Engines: adapters that launch workers and stream from them. See base.py for what the rest of the service knows."""
