"""Finished models read whole: structure, sizes, finite values, digests."""
