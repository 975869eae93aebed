"""What the machine has, what it does natively, and how fast, measured."""
