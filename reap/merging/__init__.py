"""Merging, the baseline that pruning is measured against: groups of experts that become one."""
