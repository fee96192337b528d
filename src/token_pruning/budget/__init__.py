"""Pruning to a budget: where tokens may leave, thresholds that cost what was asked for, and the choice among them."""
