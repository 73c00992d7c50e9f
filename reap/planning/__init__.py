"""Statistics to scores, scores to a plan: which experts stay."""
