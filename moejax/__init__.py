"""moejax: dense or mixture-of-experts, decided in step time."""

__version__ = "0.1.0"
