"""Training: the dense, soft, hard and mixed stages, and the evaluation they share. Needs the ``train`` extra."""
