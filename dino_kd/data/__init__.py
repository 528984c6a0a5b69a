"""From a dataset spec string to batches of uint8 crops."""
