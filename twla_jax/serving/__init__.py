"""Serves a model: slots in one cache, a scheduler that fills them, and an HTTP server in OpenAI's form."""
