"""What recommenders reached on data sets: result files, the table made of them, and comparisons of two runs."""

from __future__ import annotations
