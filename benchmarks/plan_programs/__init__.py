"""Programs behind published measurements, to be run on a ghost GPU."""
