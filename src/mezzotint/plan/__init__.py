"""Planning: memory and time of a program that ran on a ghost GPU."""
