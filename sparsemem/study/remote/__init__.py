"""A place that the driver and workers of other machines share: what goes there and what comes back."""
