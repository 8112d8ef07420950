"""Comparisons with other libraries; skipped where they are not installed."""
