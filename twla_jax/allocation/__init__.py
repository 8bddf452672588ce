"""Chooses activation bits for a model's sites: ILA-AMP, measured and solved."""
