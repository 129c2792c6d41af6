"""Equipoise: align language models to objectives that conflict."""

__version__ = "0.1.0"
