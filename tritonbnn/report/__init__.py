"""What finished runs tell, read again, measured and drawn: ``python -m tritonbnn.analyze``."""
