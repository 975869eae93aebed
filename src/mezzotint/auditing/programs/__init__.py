"""Training scripts that are planned as a user's would be."""
