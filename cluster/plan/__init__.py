"""What a layout costs before it is queued: memory per GPU, communication, step time, GPU-hours. Arithmetic only, no torch."""
