"""Measurements on the user's machine. Never imported when generating."""
