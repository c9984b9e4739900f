"""Healing an up-scaled model: continued pretraining in plain PyTorch."""
