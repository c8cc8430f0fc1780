"""The bundled scheduling policies: ``fcfs``, ``token-budget``, ``fair`` and ``deadline``.

Each is a module of its own; ``options`` has the sections of the configuration, ``views`` what they share.
"""
