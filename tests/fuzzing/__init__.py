"""Readers of foreign bytes, fed with damaged files: seeds, mutations, the run and its limits."""
