"""Fast bfloat16 and float16 execution on CPUs that lack the units for it."""
