"""Compiled models in other libraries' training loops. Each module needs its library, and nothing else imports it."""
