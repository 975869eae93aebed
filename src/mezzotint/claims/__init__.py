"""What is said about mixed precision, with the test of each claim: one object, in one place, a claim."""
