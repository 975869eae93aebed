"""What really ran: every operation of a training step, recorded and never judged."""
