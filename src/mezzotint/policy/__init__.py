"""The precision policy: one value that every part of mezzotint reads."""
