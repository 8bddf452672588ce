"""What all kernels for Hopper GPUs share."""
