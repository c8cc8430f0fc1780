"""``stoker bench``: a load generator for servers that speak the OpenAI API.

Reading order: ``command`` (options) -> ``scenarios``, ``workload``, ``traces`` (what is sent, and when) ->
``runner`` (rounds, targets in turn) -> ``target`` and ``wire`` (HTTP) -> ``figures`` (what it means) ->
``report``, ``document``, ``plots`` (what is shown).
"""
