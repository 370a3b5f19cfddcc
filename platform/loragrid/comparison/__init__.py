"""Reads recorded trials from MLflow and compares them: table, selection, verdict, statistics."""
