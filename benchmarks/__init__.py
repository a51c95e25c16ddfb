"""stepwell beside its rivals, in one run on one machine: `scripts/bench`."""
