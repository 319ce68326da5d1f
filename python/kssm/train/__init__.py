"""Training: a run's configuration, the loop, the run on disk, devices."""
