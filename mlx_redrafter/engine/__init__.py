"""Several texts at once: the only place that holds the state of decoding."""
