"""Property tests draw the same examples on every run, and have no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("deterministic")
