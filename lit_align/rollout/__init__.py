"""Rollouts: sampling answers, scoring them, and turning scores into advantages."""
