"""What a run reports: times, memory, figures and pictures."""
