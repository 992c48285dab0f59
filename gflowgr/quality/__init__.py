"""What recommenders reached on data sets: result files, the table of them, and comparisons of two runs."""

from __future__ import annotations
