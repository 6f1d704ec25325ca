"""Reports: what a plan will do, in the formats people read."""
