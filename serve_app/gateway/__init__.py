"""An OpenAI-compatible gateway: keys, roles, limits, cache, filters, routing and audit in front of any backends."""

__version__ = "0.1.0"
