"""For all tests: hypothesis sets no time limit, which a busy machine would not keep."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
