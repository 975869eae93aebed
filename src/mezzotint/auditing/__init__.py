"""Running a training program under the recorder, and judging what it did."""
