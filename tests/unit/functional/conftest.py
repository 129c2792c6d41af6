"""Property tests draw the same examples on every run, and have no deadline on a busy machine."""

import os

from hypothesis import Phase, settings

settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40, database=None)
# For `make mutants`: a failure is all that counts there, not its smallest example.
settings.register_profile("mutants", settings.get_profile("deterministic"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))
