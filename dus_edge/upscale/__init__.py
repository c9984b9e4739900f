"""Depth up-scaling: plans, views and the seam."""
