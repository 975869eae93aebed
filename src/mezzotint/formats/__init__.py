"""Number formats as data: their fields, limits and names."""
