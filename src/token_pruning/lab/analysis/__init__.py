"""Where a checkpoint's tokens go: by length, by layer, by outcome, and in single texts."""
