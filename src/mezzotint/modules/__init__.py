"""Layers that keep less for backward, as plain torch modules that any model may adopt."""
