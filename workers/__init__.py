"""Celery entry points: ``celery -A workers.gpu worker`` and ``celery -A workers.cpu worker``."""
