"""The timetable, and nothing else: ``celery -A beat beat``, one in a fleet."""

from gym_queue import names
from gym_queue.celery_app import make_app
from gym_queue.settings import Settings

settings = Settings()
app = make_app("beat", settings)
app.conf.beat_schedule = {
    "sweep": {
        "task": names.SWEEP_TASK,
        "schedule": settings.sweep_interval,
        "options": {"expires": settings.sweep_interval},
    }
}
