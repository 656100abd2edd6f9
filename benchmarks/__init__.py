"""Side by side with peers, and how cost grows. `make bench` runs it; `results/` holds what was measured."""
