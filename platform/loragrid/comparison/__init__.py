"""Reads recorded trials from MLflow and judges them: table, selection, verdict, statistics."""
