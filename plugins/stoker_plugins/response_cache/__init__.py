"""The response cache: the same answer to the same request, computed once. See ``docs/response-cache.md``."""
