"""Scores members on a task: questions, generation, answers, accuracy."""
