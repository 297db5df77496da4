"""The timetable, and nothing else: ``celery -A beat beat``, one in a fleet."""

from gym_queue import names
from gym_queue.settings import Settings
from gym_queue.timetable import make_beat

settings = Settings()
app = make_beat(settings, {"sweep": {"task": names.SWEEP_TASK, "schedule": settings.sweep_interval}})
