"""Notebooks run, pages put together, figures drawn."""
