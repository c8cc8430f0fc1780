"""OpenAI's Files and Batch API: files of requests in, files of answers out, computed in idle capacity."""
