"""Convert models and drafters; never imported when generating."""
