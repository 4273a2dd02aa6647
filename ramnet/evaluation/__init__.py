"""Evaluation on the tasks of lm-evaluation-harness."""
