"""The Python that serves: the gateway in front of the models."""
