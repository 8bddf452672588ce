"""What lies on the disk: checkpoints, unfinished work, and how many bytes."""
