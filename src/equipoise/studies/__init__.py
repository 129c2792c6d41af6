"""Studies: training, evaluation and controls put together into something a person can look at."""
