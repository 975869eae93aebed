"""Private names of torch: the only package that reads them.

A private name may be renamed or removed by any release of torch. Each one is declared once, in the file of its area,
with the features that read it and what they cannot know without it (`registry`). Importing a file of this package never
raises because of a missing name.
"""
