"""Timings and memory, measured on the machine at hand and recorded as rows."""
