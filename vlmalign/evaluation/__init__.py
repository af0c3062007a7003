"""Predictions -> metrics with n and an interval. Never imports training."""
