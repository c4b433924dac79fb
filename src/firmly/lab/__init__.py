"""Experiments: settings, training, tracking and reports."""
