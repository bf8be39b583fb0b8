"""The tiers of the answer cache."""
