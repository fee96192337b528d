"""The report: one HTML page with the results, the plots and the tokens of a few texts."""
