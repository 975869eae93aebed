"""Rules MZ2xx: what a recorded training step did, against what mixed precision needs."""
