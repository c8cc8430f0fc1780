"""``stoker tune``: measures settings in child processes and writes what is best as a profile.

``command`` is the command, ``session`` what it does, ``search`` how values are tried and when a difference
counts, ``trials`` and ``worker`` the two ends of a measurement, ``loads`` and ``drive`` what is measured,
``quality`` whether the model still says the same.
"""
