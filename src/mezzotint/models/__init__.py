"""Reference models in plain torch; they import nothing of mezzotint."""
