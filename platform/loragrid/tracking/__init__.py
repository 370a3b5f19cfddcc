"""Records a sweep in MLflow: recorder, spool, delivery."""
