"""Everything that is used from the command line: data, training, evaluation, sweeps, analyses, reports."""
