"""Reports what a run took and found: times, memory, figures and pictures."""
